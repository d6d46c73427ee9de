"""Images in a folder."""

from pathlib import Path

import pytest

from imaging.folders import is_output, list_images, search_folder
from utils import CommandError


@pytest.fixture
def folder():
    """A folder with three images, a subdirectory with another one, and other files."""
    Path("in/deeper.png").mkdir(parents=True)
    for name in ("c.webp", "b.PNG", "a.jpg", ".hidden.png", "notes.txt", "program.eps", "deeper.png/d.png"):
        Path("in", name).touch()
    return Path("in")


@pytest.mark.parametrize("recursive", [None, False, True])
def test_images_are_found_by_their_extensions(folder, recursive):
    found = [str(path.relative_to(folder)) for path in search_folder(folder, recursive).images]
    assert found == ["a.jpg", "b.PNG", "c.webp"] + ["deeper.png/d.png"] * bool(recursive)


def test_everything_skipped_is_counted_in_a_warning(folder, capfd):
    for name in ("a_srcnn_x2.jpg", "a_srcnn_x3.jpg", "x_srcnn_x4_comparison.png"):
        Path("in", name).touch()
    assert [path.name for path in list_images(folder)] == ["a.jpg", "b.PNG", "c.webp"]
    assert capfd.readouterr().err == (
        "WARNING: in: skipping 3 earlier outputs of super_resolve.py\n"
        "WARNING: in: skipping 2 files without an image extension\n"
        "WARNING: in: skipping 1 subfolder\n"
    )


@pytest.mark.parametrize(
    ("recursive", "names", "skipped"),
    [
        (None, "a.jpg b.PNG c.webp link.png", "3 subfolders"),
        (False, "a.jpg b.PNG c.webp link.png", "3 subfolders; use --recursive"),
        (True, "a.jpg b.PNG c.webp deeper.png/d.png link.png", "2 linked folders"),
    ],
)
def test_links_to_files_are_followed_but_not_links_to_folders(folder, recursive, names, skipped):
    """Following a link to a parent folder would never end."""
    Path("in/link.png").symlink_to("a.jpg")
    Path("in/loop").symlink_to(".")
    Path("in/deeper").symlink_to("deeper.png")
    Path("in/.hidden").mkdir()
    found = search_folder(folder, recursive)
    assert (" ".join(str(path.relative_to(folder)) for path in found.images), found.folders) == (names, skipped)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ("", "no images"),
        ("a.txt a/b.png", r"no images \(skipping 1 subfolder; use --recursive\)"),
        ("a_srcnn_x3.png", "no images other than earlier outputs"),
    ],
)
def test_folder_without_images_is_refused(files, problem):
    Path("in").mkdir()
    for file in files.split():
        Path("in", file).parent.mkdir(exist_ok=True)
        Path("in", file).touch()
    with pytest.raises(CommandError, match=f"^in: this folder contains {problem}$"):
        search_folder(Path("in"), recursive=False)


def test_outputs_of_every_scale_are_recognized_by_the_end_of_their_names():
    names = [f"a_srcnn_x{scale}{end}" for scale in (2, 3, 4) for end in (".png", "_comparison.png")]
    others = ["a_srcnn_x5.png", "a_srcnn_x3_.png", "a_srcnn_x33.png", "srcnn_x3.png", "a.png_srcnn_x3/b.png"]
    assert [name for name in names + others if is_output(Path(name))] == names
