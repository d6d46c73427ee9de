"""Training run: its recipe, its state, new or restored from a checkpoint, and its output folder."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data import Batch
from imaging.metrics import Report
from model import SRCNN
from training.adam import Adam
from training.checkpoints import Checkpoint, ResumeRecord, TrainingState, load_checkpoint, save_checkpoint
from training.options import Options
from training.patches import Patches
from training.recipe import Network
from training.unpickling import MAX_BYTES
from upscaling.device import dtype_name
from upscaling.distributed import rank_and_world_size
from utils import CommandError, locked, make_folder, read_file, remove_stale_files, show


@dataclass(frozen=True)
class Recipe:
    """Parts of the training loop that differ between recipes. The loop and both recipes are in train.py."""

    patches: type[Patches]
    optimizer: Callable[..., Adam]  # (model, patches, generator) -> optimizer; sets the initial weights
    network: Callable[[SRCNN, torch.dtype], Network]
    loss: Callable[[Tensor, Batch], Tensor]
    penalty: Callable[[SRCNN, Network, Tensor, float], Tensor | float]  # the last is the fraction of steps done
    schedule: Callable[[float, float, float], float]  # (peak, step, number of steps) -> learning rate


@dataclass
class Run:
    """State of a training run."""

    options: Options
    recipe: Recipe
    dtype: torch.dtype
    train_set: str  # name of the training set
    train_images: str  # fingerprint of its images
    model: SRCNN
    optimizer: Adam
    generator: torch.Generator  # draws the patches
    id: str = field(default_factory=lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    epoch: int = 0  # epochs finished
    report: Report = field(default_factory=lambda: Report("", {}))  # PSNR after that epoch; set by start
    best: float = -math.inf  # highest PSNR on luma, in dB
    best_epoch: int = 0
    history: list[ResumeRecord] = field(default_factory=list)
    began: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()))  # epoch and time of start
    speeds: list[float] = field(default_factory=list)  # HR pixels per second of each epoch since then

    def start(self, report: Report) -> None:
        """Set the first report. The best PSNR so far counts only if the training and test images are the same."""
        if self.report.fingerprint() != report.fingerprint():
            self.best, self.best_epoch = report.mean.srcnn.psnr_y, self.epoch
        self.report, self.began = report, (self.epoch, time.monotonic())

    def finish_epoch(self, report: Report) -> None:
        self.epoch += 1
        self.report = report
        if report.mean.srcnn.psnr_y > self.best:
            self.best, self.best_epoch = report.mean.srcnn.psnr_y, self.epoch

    def has_written(self, saved: Checkpoint) -> bool:
        return saved.training is not None and saved.training.run == self.id

    def continues(self, saved: Checkpoint) -> bool:
        """Return whether ``saved`` is the checkpoint from which this run is being resumed."""
        weights = self.model.state_dict().items()
        same = all(torch.equal(saved.model[name], weight.cpu()) for name, weight in weights)
        return self.has_written(saved) and saved.epoch == self.epoch and same

    def has_best(self, saved: Checkpoint) -> bool:
        """Return whether a checkpoint is this run's best. Another branch's may be of the same epoch."""
        return self.has_written(saved) and (saved.epoch, saved.psnr) == (self.best_epoch, self.best)

    def may_repeat(self, saved: Checkpoint) -> bool:
        """Return whether the next epoch may repeat ``saved``: checkpoint.best is written before checkpoint.last."""
        if not saved.training or not self.has_written(saved) or saved.epoch != self.epoch + 1:
            return False
        return Options.from_args(saved.args) == self.options and self.trains_on_images_of(saved.training)

    def trains_on_images_of(self, state: TrainingState) -> bool:
        """Return whether the training images are those of a checkpoint, as far as it says."""
        if state.train_images:
            return state.train_images == self.train_images
        return state.train_set in ("", self.train_set)  # the checkpoint predates fingerprints

    def is_milestone(self) -> bool:
        """Return whether this epoch gets a numbered checkpoint."""
        return self.epoch % self.options.save_freq == 0 or self.epoch == self.options.num_epoch

    def checkpoint(self) -> Checkpoint:
        state = TrainingState(
            optimizer=self.optimizer.state_dict(),
            random_state=self.generator.get_state(),
            precision=dtype_name(self.dtype),
            report=self.report,
            best=self.best,
            best_epoch=self.best_epoch,
            train_set=self.train_set,
            train_images=self.train_images,
            run=self.id,
            history=self.history,
        )
        model = self.model.state_dict()
        return Checkpoint(model, self.epoch, self.report.mean.srcnn.psnr_y, self.options.to_args(), state)

    def save_start(self, output: Path) -> None:
        """Write checkpoint.last before the first epoch, and checkpoint.best if that is missing and this is the best."""
        names = ["last"]
        trained = self.epoch > 0 or self.options.init
        if trained and self.epoch == self.best_epoch and not (output / "checkpoint.best").exists():
            names.insert(0, "best")
        save_checkpoint(self.checkpoint(), *(output / f"checkpoint.{name}" for name in names))

    def save(self, output: Path) -> None:
        """Write checkpoint.last; checkpoint.best after the best epoch; checkpoint.<epoch> every save_freq epochs."""
        names = ["best"] if self.epoch == self.best_epoch else []
        if self.is_milestone():
            names.append(str(self.epoch))
        # checkpoint.last comes last: a run that is killed here repeats the epoch, and writes the others again.
        save_checkpoint(self.checkpoint(), *(output / f"checkpoint.{name}" for name in [*names, "last"]))


# ------------------------------------------------------------------------- new or restored


def new_run(
    options: Options, recipe: Recipe, patches: Patches, dtype: torch.dtype, init: Checkpoint | None = None
) -> Run:
    """Return a new run. The seed determines its patches, and its initial weights unless ``init`` has them."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = SRCNN(options.scale).to(patches.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = recipe.optimizer(model, patches, generator)
    if init:
        model.load_state_dict(init.model)
    return Run(options, recipe, dtype, patches.name, patches.fingerprint, model, optimizer, generator)


def restored_run(checkpoint: Checkpoint, options: Options, recipe: Recipe, patches: Patches, dtype: torch.dtype) -> Run:
    """Return a run that continues a checkpoint: exactly, or with the weights alone if another program wrote it."""
    run = new_run(options, recipe, patches, dtype, checkpoint)
    run.epoch = checkpoint.epoch
    state = checkpoint.training
    if not state:
        run.history.append((checkpoint.epoch, None))
        return run
    run.optimizer.load_state_dict(state.optimizer)
    run.generator.set_state(state.random_state)
    run.id, run.history = state.run, list(state.history)
    if run.trains_on_images_of(state):
        run.report, run.best, run.best_epoch = state.report, state.best, state.best_epoch
    else:
        show("the training images have changed since the checkpoint; the best PSNR is reset")
    if Options.from_args(checkpoint.args) != options:
        run.history.append((checkpoint.epoch, checkpoint.args))
    return run


# --------------------------------------------------------------------------- output folder


@contextlib.contextmanager
def lock_output_dir(output: Path) -> Iterator[None]:
    """Create the output folder and lock it, so that no other run writes to it. Rank 0 does that for all processes.

    On Windows nothing is locked.
    """
    if rank_and_world_size()[0]:
        yield
        return
    make_folder(output)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(output))
        except BlockingIOError as error:
            raise CommandError(f"another run is writing to {output}; use another --output") from error
        remove_stale_files(output)
        yield


def keep_other_checkpoints(output: Path, run: Run) -> None:
    """Rename the checkpoints that this run would overwrite but does not continue.

    They belong to another run, or to another branch of this run if an earlier checkpoint than its last is resumed.
    Numbered checkpoints of other runs are overwritten.
    """
    best, last = output / "checkpoint.best", output / "checkpoint.last"
    saved = load_if_valid(last)
    continued = saved is not None and run.continues(saved)
    others = [] if continued else [*later_checkpoints(output, run), *([last] if last.exists() else [])]
    saved = load_if_valid(best)
    ours = saved and (run.has_best(saved) or (continued and run.may_repeat(saved)))
    if best.exists() and (others or not ours):
        others.insert(0, best)
    for path in others:
        keep_aside(path)
    if saved and ours and best in others:  # it is also the best of this branch
        save_checkpoint(saved, best)


def later_checkpoints(output: Path, run: Run) -> list[Path]:
    """Return the numbered checkpoints of later epochs from other branches of this run, and the one given as --init."""
    numbers = [path.name.removeprefix("checkpoint.") for path in output.glob("checkpoint.*")]
    later = sorted(int(number) for number in numbers if number.isdecimal() and int(number) > run.epoch)
    init, found = Path(run.options.init).resolve(), []
    for path in (output / f"checkpoint.{number}" for number in later):
        saved = load_if_valid(path)
        if path.resolve() == init or (saved and run.has_written(saved)):
            found.append(path)
    return found


def keep_aside(path: Path) -> None:
    """Rename a file by appending the first free number, and print both names."""
    number = 1
    while (other := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    os.replace(path, other)
    show(f"{path} is from another run, branch, image set or later epoch; it is kept as {other}")


def load_if_valid(path: Path) -> Checkpoint | None:
    """Load a checkpoint; return None if there is no valid one. Raise CommandError if it cannot be read."""
    if not path.exists():
        return None
    data = read_file(path, MAX_BYTES)
    with contextlib.suppress(CommandError):
        return load_checkpoint(path, data)
    return None
