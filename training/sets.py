"""The training and test sets of a run, found and loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from data import ImageSet, TestSet, default_folder, find_data, load_sets
from imaging.dead_leaves import DEAD_LEAVES
from training.options import Args, Options
from upscaling.distributed import broadcast, rank_and_world_size
from utils import CommandError


def find_sets(options: Options, given: Args, fresh: bool) -> tuple[Options, ImageSet, TestSet]:
    """Find the sets and load them.

    Parameters
    ----------
    options : options of the run
    given : options from the command line
    fresh : whether the run is new, and not resumed

    Returns
    -------
    the options with the folders in which the sets were found, the training set, and the test set

    Raises
    ------
    CommandError if a set is missing or an image cannot be read
    """
    with data_hint(options, given):
        if rank_and_world_size()[0] == 0:
            options = options.with_folders(find_data(options.folders(), given, fresh))
        options = broadcast(options)
        return options, *load_sets(options.train_data, options.test_data, options.hold_out)


@contextlib.contextmanager
def data_hint(options: Options, given: Args) -> Iterator[None]:
    """If images are missing where a checkpoint says they are, name the options that say where they are now."""
    try:
        yield
    except CommandError as error:
        folders = {name: default_folder(folder) for name, folder in options.folders().items() if name not in given}
        missing = [name for name, folder in folders.items() if folder != DEAD_LEAVES and not Path(folder).is_dir()]
        if not missing:
            raise
        names = " and ".join(f"--{name.replace('_', '-')}=DIR" for name in missing)
        raise CommandError(f"{error}; if the images are elsewhere, add {names}") from error
