"""Images in a folder."""

from pathlib import Path

import pytest

from imaging.folders import list_images
from utils import CommandError


@pytest.fixture
def folder():
    """A folder with three images, a subdirectory with another one, and other files."""
    Path("in/deeper.png").mkdir(parents=True)
    for name in ("c.webp", "b.PNG", "a.jpg", ".hidden.png", "notes.txt", "program.eps", "deeper.png/d.png"):
        Path("in", name).touch()
    return Path("in")


@pytest.mark.parametrize("recursive", [False, True])
def test_folder_lists_images_by_name_and_warns_about_other_files(folder, recursive, capfd):
    found = [str(path.relative_to(folder)) for path in list_images(folder, recursive)]
    assert found == ["a.jpg", "b.PNG", "c.webp"] + ["deeper.png/d.png"] * recursive
    assert capfd.readouterr().err.startswith("WARNING: in: skipping 2 files ")


def test_folder_without_images_is_refused(folder):
    for image in list_images(folder):
        image.unlink()
    with pytest.raises(CommandError, match=r"^in: "):
        list_images(folder)
