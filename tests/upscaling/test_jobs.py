"""Which file goes where."""

import re
from pathlib import Path

import pytest
from helpers import contents

from imaging.formats import EXTENSIONS
from upscaling.jobs import find_jobs
from utils import CommandError

FILES = """
    lr.bmp deep/a.b.jpg hr.png hr_srcnn_x3.png x_comparison.png net.png there/x done/x_srcnn_x3.png
    in/b.png in/a.jpg in/a_srcnn_x3.jpg in/.hidden.png in/deeper.png/x
    mixed/a.psd mixed/b.JP2 mixed/c.tif mixed/d_srcnn_x3_.png mixed/e_srcnn_x3_comparison.png
    course/a_lr.bmp course/a_bicubic_x3.bmp course/a_GT.bmp course/b_lr.bmp course/b_GT.bmp
    tree/a.png tree/sub/a.png tree/sub/c_lr.bmp tree/sub/.no/x.png tree/b/b.png twin/a.png twin/sub/c_GT.png
    lr/a.png lr/b.png lr/c_GT.png lr/d.png hr/a.bmp hr/b_GT.png hr/b.bmp hr/c_GT.png
"""


@pytest.fixture
def find():
    """find_jobs with empty files, since it does not look inside, and all names as text."""
    for path in map(Path, FILES.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def call(inputs, output, truth=None, ending=None, recursive=False):
        files = [Path(name) for name in inputs.split()]
        return find_jobs(files, output, truth and Path(truth), Path("net.png"), ending, recursive)

    return call


def pairs(text):
    return [tuple(map(Path, pair.split())) for pair in text.split(", ")]


@pytest.mark.parametrize(
    ("inputs", "output", "wanted"),
    [
        ("deep/a.b.jpg", None, "deep/a.b.jpg deep/a.b_srcnn_x3.jpg"),
        ("lr.bmp", "big.png", "lr.bmp big.png"),
        ("lr.bmp", "there", "lr.bmp there/lr_srcnn_x3.bmp"),
        ("lr.bmp", "new/", "lr.bmp new/lr_srcnn_x3.bmp"),
        ("in", None, "in/a.jpg in/a_srcnn_x3.jpg, in/b.png in/b_srcnn_x3.png"),
        ("lr.bmp in", "o/p", "lr.bmp o/p/lr_srcnn_x3.bmp, in/a.jpg o/p/a_srcnn_x3.jpg, in/b.png o/p/b_srcnn_x3.png"),
        ("in/b.png in ./in/b.png", "o", "in/b.png o/b_srcnn_x3.png, in/a.jpg o/a_srcnn_x3.jpg"),
    ],
)
def test_outputs(find, inputs, output, wanted):
    assert [(job.lr, job.sr) for job in find(inputs, output, None)] == pairs(wanted)
    assert output in (None, "big.png") or Path(output).is_dir()


@pytest.mark.parametrize(
    ("ending", "endings", "warning"),
    [
        (None, "png png tif png", "WARNING: .JP2, .psd: such files are not written; their outputs are PNG\n"),
        ("jpg", "jpg jpg jpg jpg", ""),
    ],
)
def test_outputs_have_a_format_that_is_written(find, capsys, ending, endings, warning):
    """Only names that end in _srcnn_x3 or _srcnn_x3_comparison are outputs of earlier runs."""
    jobs = find("mixed", None, ending=ending)
    stems = ("a_srcnn_x3", "b_srcnn_x3", "c_srcnn_x3", "d_srcnn_x3__srcnn_x3")
    assert [job.sr.name for job in jobs] == [".".join(name) for name in zip(stems, endings.split(), strict=True)]
    assert capsys.readouterr().err == warning


def test_of_the_courses_images_those_in_lr_alone_are_taken(find, capsys):
    assert [job.lr.name for job in find("course", None)] == ["a_lr.bmp", "b_lr.bmp"]
    assert capsys.readouterr().err == "WARNING: course: skipping 3 images whose names do not end in _lr\n"


@pytest.mark.parametrize(
    ("inputs", "truth", "wanted"),
    [
        ("lr.bmp", "hr.png", "lr.bmp hr.png"),
        ("course", "./course", "course/a_lr.bmp course/a_GT.bmp, course/b_lr.bmp course/b_GT.bmp"),
        # The truth with the ending _GT is preferred; the same name in both folders is no obstacle.
        ("lr/a.png lr", "hr", "lr/a.png hr/a.bmp, lr/b.png hr/b_GT.png, lr/c_GT.png hr/c_GT.png"),
        ("in/a.jpg", "course", "in/a.jpg course/a_GT.bmp"),
    ],
)
def test_ground_truths_are_found_by_name(find, capsys, inputs, truth, wanted):
    jobs = find(inputs, "o/", truth)
    assert [(job.lr, job.hr) for job in jobs] == pairs(wanted)
    assert [job.comparison for job in jobs] == [Path("o", f"{job.lr.stem}_srcnn_x3_comparison.png") for job in jobs]
    warnings = {"course": "WARNING: course: skipping 3 images without a ground truth\n"}
    warnings["lr/a.png lr"] = "WARNING: lr: skipping 1 images without a ground truth\n"
    assert capsys.readouterr().err == warnings.get(inputs, "")


@pytest.mark.parametrize(
    ("inputs", "output", "truth", "ending", "problem"),
    [
        ("lr.bmp", None, "missing.png", None, "missing.png: no such file or folder"),
        ("lr.bmp hr.png", None, "hr.png", None, "hr.png: several images need a folder of ground truths"),
        ("lr.bmp", None, "lr.bmp", None, "lr.bmp: it holds no ground truth for lr.bmp"),
        ("lr.bmp", None, "hr", None, "hr: it holds no ground truth for lr.bmp"),
        ("in", None, "in", None, "in: this folder holds no images with a ground truth in in"),
        ("done", None, None, None, "done: this folder holds no images, apart from earlier outputs"),
        ("lr.bmp", "lr.bmp", None, None, "lr.bmp is an input"),
        ("lr.bmp", "net.png", None, None, "net.png is an input"),
        ("lr.bmp", "hr.png", "hr.png", None, "hr.png is an input"),
        ("lr.bmp hr_srcnn_x3.png hr.png", None, None, None, "hr_srcnn_x3.png is an input"),
        ("lr/b.png in", "in", None, None, "in/b_srcnn_x3.png is also the output of lr/b.png"),
        ("lr.bmp", "x.png", "x_comparison.png", None, "x_comparison.png is an input"),
        ("lr.bmp", "new", None, None, "new: use one of the endings .bmp, .gif, .jpeg, .png"),
        ("lr.bmp", "x.y", None, None, f"x.y: use one of the endings {EXTENSIONS}; for a folder, type --output=x.y/"),
        ("lr.bmp hr.png", "lr.bmp", None, None, "cannot create folder lr.bmp: File exists"),
        ("-", None, None, None, "standard output needs a format; add --format=png"),
        ("lr.bmp -", None, None, "png", "- stands for a single image"),
        ("in", "-", None, "png", "- stands for a single image"),
        ("-", "-", "hr.png", "png", "--ground-truth also saves a picture, and needs --output=FILE"),
        ("-", "net.png", None, None, "net.png is an input"),
    ],
)
def test_what_does_not_fit_is_refused(find, inputs, output, truth, ending, problem):
    before = contents()
    with pytest.raises(CommandError, match=f"^{re.escape(problem)}"):
        find(inputs, output, truth, ending)
    assert contents() == before


def test_the_tree_is_kept_below_the_output(find):
    jobs = find("tree", "o", recursive=True)
    assert [(job.lr, job.sr) for job in jobs] == pairs(
        "tree/a.png o/a_srcnn_x3.png, tree/b/b.png o/b/b_srcnn_x3.png, tree/sub/c_lr.bmp o/sub/c_lr_srcnn_x3.bmp"
    )
    assert Path("o/sub").is_dir()
    assert [job.sr for job in find("tree", None)] == [Path("tree/a_srcnn_x3.png")]
    jobs = find("tree", None, "twin", recursive=True)
    assert [(job.lr, job.hr) for job in jobs] == pairs("tree/a.png twin/a.png, tree/sub/c_lr.bmp twin/sub/c_GT.png")


def test_a_dash_stands_for_standard_input_and_output_and_a_format_may_be_given(find):
    assert find("-", None, ending="tif") == [(Path("-"), Path("-"), None, "TIFF")]
    assert find("lr.bmp", "-", ending="jpg") == [(Path("lr.bmp"), Path("-"), None, "JPEG")]
    assert find("-", "a.png", "hr.png") == [(Path("-"), Path("a.png"), Path("hr.png"), "PNG")]
    assert find("lr.bmp", "a.jpeg", ending="jpg") == [(Path("lr.bmp"), Path("a.jpeg"), None, "JPEG")]
    with pytest.raises(CommandError, match=r"^--format=png contradicts --output=a\.jpg; leave out one of them$"):
        find("lr.bmp", "a.jpg", ending="png")
