"""Pairing of LR images with outputs and ground truths."""

import contextlib
import os
from pathlib import Path

import pytest
from helpers import contents

from imaging.folders import is_output
from upscaling.jobs import Job, find_jobs
from utils import TEMPORARY_SUFFIX, CommandError

FILES = """
    lr.bmp deep/a.b.jpg hr.png hr_srcnn_x3.png x_srcnn_x3_comparison.png net.png there/x done/x_srcnn_x3.png
    in/b.png in/a.jpg in/a_srcnn_x3.jpg in/.hidden.png in/deeper.png/x
    mixed/a.psd mixed/b.JP2 mixed/c.tif mixed/d_srcnn_x3_.png mixed/e_srcnn_x3_comparison.png
    course/a_lr.bmp course/a_bicubic_x3.bmp course/a_GT.bmp course/b_lr.bmp course/b_GT.bmp
    tree/a.png tree/sub/a.png tree/sub/c_lr.bmp tree/sub/.no/x.png tree/b/b.png twin/a.png twin/sub/c_GT.png
    lr/a.png lr/b.png lr/c_GT.png lr/d.png hr/a.bmp hr/b_GT.png hr/b.bmp hr/c_GT.png
    published/a_LR.png published/a_HR.png published/a_bicubic.png
"""


@pytest.fixture
def find():
    """Call find_jobs with names as text. The files are empty, since it does not open them."""
    for path in map(Path, FILES.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("link.bmp").symlink_to("lr.bmp")

    def call(inputs, output=None, truth=None, scale=3, **options):
        files = [Path(name) for name in inputs.split()]
        return find_jobs(files, output, truth and Path(truth), Path("net.png"), scale, **options)

    return call


def pairs(text):
    return [tuple(map(Path, pair.split())) for pair in text.split(", ")]


# ------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize(
    ("inputs", "output", "expected"),
    [
        ("deep/a.b.jpg", None, "deep/a.b.jpg deep/a.b_srcnn_x3.jpg"),
        ("lr.bmp", "big.png", "lr.bmp big.png"),
        ("lr.bmp", "there", "lr.bmp there/lr_srcnn_x3.bmp"),
        ("lr.bmp", "new/", "lr.bmp new/lr_srcnn_x3.bmp"),
        ("in", None, "in/a.jpg in/a_srcnn_x3.jpg, in/b.png in/b_srcnn_x3.png"),
        ("lr.bmp in", "o/p", "lr.bmp o/p/lr_srcnn_x3.bmp, in/a.jpg o/p/a_srcnn_x3.jpg, in/b.png o/p/b_srcnn_x3.png"),
        ("in/b.png in deep/../in/b.png", "o", "in/b.png o/b_srcnn_x3.png, in/a.jpg o/a_srcnn_x3.jpg"),
    ],
)
def test_output_is_named_file_or_in_named_folder_or_beside_input(find, inputs, output, expected):
    assert [(job.lr, job.sr) for job in find(inputs, output)] == pairs(expected)
    assert output in (None, "big.png") or Path(output).is_dir()


@pytest.mark.parametrize(("output", "name"), [(None, "lr"), ("o/", "lr"), ("big.png", "big"), ("x_srcnn_x3.png", "x")])
def test_comparison_is_named_as_an_output_whatever_the_output_is_called(find, output, name):
    (job,) = find("lr.bmp", output, "hr.png")
    assert job.comparison == job.sr.with_name(f"{name}_srcnn_x3_comparison.png")
    assert is_output(job.comparison)


def test_names_of_outputs_have_the_scale(find):
    (job,) = find("lr.bmp", "o/", "hr.png", scale=2)
    assert job.outputs == [Path("o/lr_srcnn_x2.bmp"), Path("o/lr_srcnn_x2_comparison.png")]
    jobs = find("in/a.jpg in/b.png mixed/a.psd", "o/", extension="png", scale=4)
    assert [job.sr.name for job in jobs] == ["a.jpg_srcnn_x4.png", "b_srcnn_x4.png", "a.psd_srcnn_x4.png"]


def test_output_of_another_scale_does_not_count_as_done(find):
    Path("lr_srcnn_x2.bmp").touch()
    assert [find("lr.bmp", scale=scale)[0].is_done() for scale in (2, 3, 4)] == [True, False, False]


def test_output_is_png_if_format_of_input_cannot_be_written(find, capsys):
    assert [job.sr.suffix for job in find("mixed")] == [".png", ".png", ".tif", ".png"]
    assert capsys.readouterr().err == "WARNING: cannot write .JP2, .psd; writing PNG instead\n"


def test_extension_applies_to_all_outputs(find, capsys):
    assert {job.sr.suffix for job in find("mixed", extension="jpg")} == {".jpg"}
    assert capsys.readouterr().err == ""


def test_earlier_outputs_are_recognized_by_the_end_of_their_names(find):
    assert [job.lr.name for job in find("mixed")] == ["a.psd", "b.JP2", "c.tif", "d_srcnn_x3_.png"]


def test_recursive_search_mirrors_subfolders_in_output_folder(find):
    jobs = find("tree", "o", recursive=True)
    assert [(job.lr, job.sr) for job in jobs] == pairs(
        "tree/a.png o/a_srcnn_x3.png, tree/b/b.png o/b/b_srcnn_x3.png, tree/sub/c_lr.bmp o/sub/c_lr_srcnn_x3.bmp"
    )
    assert Path("o/sub").is_dir()


def test_subfolders_are_ignored_by_default(find):
    assert [job.sr for job in find("tree")] == [Path("tree/a_srcnn_x3.png")]


@pytest.mark.parametrize(
    ("inputs", "truth", "warns"),
    [("lr.bmp hr.png", None, True), ("lr.bmp", "hr.png", True), ("course", None, False), ("lr/a.png", "hr", False)],
)
def test_recursive_search_without_a_folder_is_pointed_out(find, capsys, inputs, truth, warns):
    find(inputs, truth=truth, recursive=True)
    assert ("WARNING: --recursive has no effect, since no input is a folder\n" in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("inputs", "output", "truth", "extension", "job"),
    [
        ("-", None, None, "tif", ("-", "-", None, "TIFF")),
        ("lr.bmp", "-", None, "jpg", ("lr.bmp", "-", None, "JPEG")),
        ("-", "a.png", "hr.png", None, ("-", "a.png", "hr.png", "PNG")),
        ("lr.bmp", "a.jpeg", None, "jpg", ("lr.bmp", "a.jpeg", None, "JPEG")),
    ],
)
def test_format_is_given_by_extension_or_output_name(find, inputs, output, truth, extension, job):
    lr, sr, hr, format = job
    assert find(inputs, output, truth, extension=extension) == [
        Job(Path(lr), Path(sr), hr and Path(hr), format, scale=3)
    ]


@pytest.mark.parametrize(("inputs", "output"), [("-", "o/a.png"), ("lr.bmp", "o/a.png"), ("mixed", "o/")])
def test_temporary_files_beside_outputs_are_removed(find, inputs, output):
    Path("o").mkdir()
    Path(f"o/.a.png.1{TEMPORARY_SUFFIX}").touch()
    find(inputs, output)
    assert os.listdir("o") == []


# --------------------------------------------------- outputs that would have the same name


@pytest.fixture
def outputs(find):
    """Call find_jobs for one extension, and return the outputs, or problems, by input."""

    def call(inputs, output=None, truth=None, extension=None):
        for name in inputs.split():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).touch()
        jobs = find(inputs, output, truth, extension=extension)
        return {str(job.lr): job.problem or str(job.sr) for job in jobs}

    return call


@pytest.mark.parametrize(
    ("inputs", "truth", "extension", "expected"),
    [
        ("x.jpg y.jpg x.png", None, "png", "x.jpg_srcnn_x3.png y_srcnn_x3.png x.png_srcnn_x3.png"),
        ("x.png x.avif", None, None, "x.png_srcnn_x3.png x.avif_srcnn_x3.png"),
        ("x.jpg x.png", None, None, "x_srcnn_x3.jpg x_srcnn_x3.png"),
        ("x.jpg x.png x.jpg.png", None, "png", "x.jpg_srcnn_x3.png x.png_srcnn_x3.png x.jpg.png_srcnn_x3.png"),
        ("x.jpg x.png", "hr.png", None, "x.jpg_srcnn_x3.jpg x.png_srcnn_x3.png"),  # for the sake of comparisons
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_outputs_of_same_name_keep_extension_of_input(outputs, inputs, truth, extension, expected, order):
    if truth:
        Path("hrs").mkdir()
        for name in ("x.png", "y.png"):
            Path("hrs", name).touch()
    wanted = dict(zip(inputs.split(), expected.split(), strict=True))
    assert outputs(" ".join(inputs.split()[::order]), None, truth and "hrs", extension) == wanted


def test_second_of_two_inputs_with_same_name_fails_alone(outputs):
    found = outputs("p/x.png q/x.png p/y.png", "o")
    assert found.pop("q/x.png").startswith("q/x.png: o/x_srcnn_x3.png is also the output of p/x.png; use a different ")
    assert found == {"p/x.png": "o/x_srcnn_x3.png", "p/y.png": "o/y_srcnn_x3.png"}


@pytest.mark.parametrize(
    ("inputs", "expected", "skipped"),
    [
        ("p/x.png p/x_srcnn_x3.png", ["p/x.png"], 1),
        ("p/x_srcnn_x3_comparison.png p/x_srcnn_x3.png p/x.png p/y.png", ["p/x.png", "p/y.png"], 2),
        ("p/x_srcnn_x3.png", ["p/x_srcnn_x3.png"], 0),
        ("p/x.png p/x_srcnn_x2.png p/x_srcnn_x4_comparison.png", ["p/x.png"], 2),
    ],
)
def test_earlier_outputs_among_inputs_are_skipped(outputs, capsys, inputs, expected, skipped):
    """A pattern of the shell, such as *.png, matches them in a second run."""
    assert list(outputs(inputs)) == expected
    number = {0: "", 1: "1 earlier output", 2: "2 earlier outputs"}[skipped]
    assert capsys.readouterr().err == f"WARNING: skipping {number} of super_resolve.py among the inputs\n" * bool(
        skipped
    )


def test_folder_with_name_of_an_output_is_searched(outputs, capsys):
    Path("p_srcnn_x3").mkdir()
    Path("p_srcnn_x3/a.png").touch()
    assert list(outputs("b.png p_srcnn_x3")) == ["b.png", "p_srcnn_x3/a.png"]
    assert capsys.readouterr().err == ""


def test_output_of_another_job_does_not_count_as_done(find):
    for name in ("p/x.png", "q/x.png", "o/x_srcnn_x3.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert [job.is_done() for job in find("p/x.png q/x.png", "o")] == [True, False]


@pytest.mark.parametrize("length", [255, 256])
@pytest.mark.parametrize(("suffix", "truth"), [("_srcnn_x3.png", None), ("_srcnn_x3_comparison.png", "hr.png")])
def test_names_of_outputs_may_be_as_long_as_the_file_system_allows(find, length, suffix, truth):
    name = "é" * 100  # two bytes each
    name += "x" * (length - len(f"{name}{suffix}".encode()))
    Path(f"{name}.png").touch()
    (job,) = find(f"{name}.png", truth=truth)
    assert not job.is_done()
    problem = pytest.raises(CommandError, match=r": its name is too long; use a shorter one$")
    with problem if length > 255 else contextlib.nullcontext():
        job.check()


# ----------------------------------------------------------- LR images and ground truths


def test_other_images_are_skipped_if_some_have_lr_suffix(find, capsys):
    assert [job.lr.name for job in find("course")] == ["a_lr.bmp", "b_lr.bmp"]
    assert capsys.readouterr().err == "WARNING: course: skipping 3 images without names that end in _lr\n"


@pytest.mark.parametrize(
    ("inputs", "truth", "expected", "skipped"),
    [
        ("lr.bmp", "hr.png", "lr.bmp hr.png", ""),
        ("course", "./course", "course/a_lr.bmp course/a_GT.bmp, course/b_lr.bmp course/b_GT.bmp", "course: 3 images"),
        # A name that ends in _GT is preferred. Both folders may contain the same name.
        ("lr/a.png lr", "hr", "lr/a.png hr/a.bmp, lr/b.png hr/b_GT.png, lr/c_GT.png hr/c_GT.png", "lr: 1 image"),
        ("in/a.jpg", "course", "in/a.jpg course/a_GT.bmp", ""),
        ("published", "published", "published/a_LR.png published/a_HR.png", "published: 2 images"),
        ("published/a_LR.png", "published", "published/a_LR.png published/a_HR.png", ""),
    ],
)
def test_ground_truths_are_found_by_name(find, capsys, inputs, truth, expected, skipped):
    assert [(job.lr, job.hr) for job in find(inputs, "o/", truth)] == pairs(expected)
    folder, _, images = skipped.partition(": ")
    warning = f"WARNING: {folder}: skipping {images} without a ground truth\n"
    assert capsys.readouterr().err == (warning if skipped else "")


def test_ground_truths_are_found_in_same_subfolder(find):
    jobs = find("tree", truth="twin", recursive=True)
    assert [(job.lr, job.hr) for job in jobs] == pairs("tree/a.png twin/a.png, tree/sub/c_lr.bmp twin/sub/c_GT.png")


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("inputs", "output", "truth", "extension", "problem"),
    [
        ("lr.bmp", None, "missing.png", None, "missing.png: no such file"),
        ("lr.bmp hr.png", None, "hr.png", None, "hr.png: --ground-truth must be a folder"),
        ("lr.bmp", None, "lr.bmp", None, "lr.bmp: the ground truth of lr.bmp is the image itself"),
        ("deep/a.b.jpg", None, "deep", None, "deep: the ground truth of a.b.jpg is the image itself"),
        ("link.bmp", None, "lr.bmp", None, "lr.bmp: the ground truth of link.bmp is the image itself"),
        ("lr.bmp", None, "hr", None, "hr: no ground truth for lr.bmp"),
        ("in", None, "in", None, "in: this folder contains no images with a ground truth in in"),
        ("done", None, None, None, "done: this folder contains no images"),
        ("lr.bmp", "lr.bmp", None, None, "lr.bmp would overwrite an input"),
        ("lr.bmp", "net.png", None, None, "net.png would overwrite an input"),
        ("lr.bmp", "hr.png", "hr.png", None, "hr.png would overwrite an input"),
        ("lr.bmp", "x.png", "x_srcnn_x3_comparison.png", None, "x_srcnn_x3_comparison.png would overwrite an input"),
        ("lr.bmp", "new", None, None, "new: use one of the extensions .bmp, .gif, .jpeg, .png"),
        ("lr.bmp", "a.jpg", None, "png", "--format=png contradicts --output=a.jpg"),
        ("lr.bmp hr.png", "lr.bmp/", None, None, "cannot .* lr.bmp: File exists"),
        (
            "lr.bmp hr.png",
            "o.jpg",
            None,
            None,
            "--output=o.jpg names a file, .* use --format=jpeg, or --output=o.jpg/ for a folder",
        ),
        (
            "in",
            "o.PNG",
            None,
            "png",
            "--output=o.PNG names a file, but there are several images; use --format=png, or --output=o.PNG/",
        ),
        ("-", None, None, None, "standard output needs a format"),
        ("lr.bmp -", None, None, "png", "- stands for a single image"),
        ("in", "-", None, "png", "- stands for a single image"),
        ("-", "-", "hr.png", "png", "--ground-truth .* needs --output=FILE"),
        ("-", "net.png", None, None, "net.png would overwrite an input"),
    ],
)
def test_conflicting_arguments_are_refused_and_write_nothing(find, inputs, output, truth, extension, problem):
    before = contents()
    with pytest.raises(CommandError, match=f"^{problem}"):
        find(inputs, output, truth, extension=extension)
    assert contents() == before
