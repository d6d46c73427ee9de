import io
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_one_line, assert_same, contents, expected, random_image, rows_of, trained_model
from PIL import Image

import super_resolve
from imaging.images import bicubic, flatten, to_tensor
from imaging.metrics import Psnr, Scores, psnr
from super_resolve import Share, load_upscaler, summarize, upscale
from utils import CommandError

COMMAND = ("super_resolve.py", "--precision=fp32", "--checkpoint=net")


# ------------------------------------------------------------------------------- upscaling


def test_it_writes_the_networks_output_beside_the_input(cli, pictures):
    lr, _, model = pictures
    before = contents()
    status, out, err = cli(*COMMAND, "lr.bmp")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"lr_srcnn_x3\.bmp: 30x30 -> 90x90 in [\d.]+ s on cpu, fp32\n", out)
    with Image.open("lr_srcnn_x3.bmp") as sr:
        assert sr.format == "BMP"
        assert_same(sr, expected(model, lr))
    after = contents()
    del after["lr_srcnn_x3.bmp"]
    assert after == before


def test_the_shipped_checkpoint_is_the_default_and_the_format_is_free(cli, pictures):
    pictures[0].save("lr.jp2", irreversible=False)
    status, _, err = cli("super_resolve.py", "--precision=fp32", "lr.jp2")
    assert (status, err) == (0, "WARNING: cannot write .jp2; writing PNG instead\n")
    assert_same(Image.open("lr_srcnn_x3.png"), expected(trained_model(), pictures[0]))
    assert cli("super_resolve.py", "lr.jp2", "--format=webp", "-o", "new/")[0] == 0
    assert Image.open("new/lr_srcnn_x3.webp").format == "WEBP"


def test_a_file_that_fails_is_reported_at_the_end_and_the_others_are_done(cli, pictures):
    Path("in").mkdir()
    for name in ("b.png", "a.jpg"):
        pictures[0].save(f"in/{name}")
    Path("in/notes.txt").write_text("no image")
    Path("in/aa.png").write_bytes(b"\x89PNG\r\n")
    status, out, err = cli(*COMMAND, "lr.bmp", "in", "--output=o/p")
    assert status == 1
    warning, failure, end = err.splitlines()
    assert warning.startswith("WARNING: in: skipping 1 file ")
    assert failure.startswith("error: in/aa.png: not an image")
    assert end == "error: 1 of 4 images failed"
    names = ["lr_srcnn_x3.bmp", "a_srcnn_x3.jpg", "b_srcnn_x3.png"]
    *lines, summary = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"o/p/{name}" for name in names]
    assert re.fullmatch(r"3 of 4 images upscaled in 0:\d\d:\d\d", summary)
    assert sorted(os.listdir("o/p")) == sorted(names)


def test_a_batch_goes_on_where_it_was_interrupted(cli, pictures):
    """What is there stays, here with other content; what comes with a comparison needs both."""
    for name in ("a", "sub/a", "sub/deeper/b"):
        Path("in", name).parent.mkdir(exist_ok=True)
        pictures[0].save(f"in/{name}.png")
        Path("hr", name).parent.mkdir(parents=True, exist_ok=True)
        pictures[1].save(f"hr/{name}.png")
    command = (*COMMAND, "in", "--recursive", "--skip-existing", "--output=o")
    Path("o/sub").mkdir(parents=True)
    Path("o/sub/a_srcnn_x3.png").write_text("there")
    status, out, err = cli(*command)
    assert (status, err) == (0, "")
    assert re.search(r"^2 of 3 images upscaled in 0:\d\d:\d\d, 1 were there already$", out, re.M)
    assert Path("o/sub/a_srcnn_x3.png").read_text() == "there"
    assert Image.open("o/sub/deeper/b_srcnn_x3.png").size == (90, 90)
    assert cli(*command)[1] == "0 of 3 images upscaled in 0:00:00, 3 were there already\n"
    out = cli(*command, "--ground-truth=hr")[1]
    assert list(rows_of(out)) == ["in/a.png", "in/sub/a.png", "in/sub/deeper/b.png", "hr"]


def transparent(lr, hr):
    mask = Image.new("L", (90, 90))
    mask.paste(255, (9, 9, 60, 60))
    for image in (lr, hr):
        image.putalpha(mask.resize(image.size))
    return lr, hr


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (transparent, ""),
        (lambda lr, hr: (lr.convert("L"), hr.convert("L")), ""),
        (lambda lr, hr: (lr, hr.convert("L")), ""),
        (lambda lr, hr: (lr.convert("L"), hr), ""),
        # The course made its LR images without cropping: 256 -> 85, so 3 x 85 is one less than 256.
        (lambda lr, hr: (lr, bicubic(hr, (92, 91))), "WARNING: the ground truth has 92x91 pixels"),
    ],
    ids=["on white", "gray", "as gray", "as RGB", "at the size of the ground truth"],
)
def test_what_differs_from_the_ground_truth_is_measured(cli, pictures, change, warning):
    for image, name in zip(change(*pictures[:2]), ("lr.png", "hr.png"), strict=True):
        image.save(name)
    status, out, err = cli(*COMMAND, "lr.png", "--ground-truth=hr.png")
    assert (status, err.count("\n")) == (0, bool(warning))
    assert err.startswith(warning)
    lr, sr, hr = (flatten(Image.open(file)) for file in ("lr.png", "lr_srcnn_x3.png", "hr.png"))
    a, b = (psnr(to_tensor(bicubic(image.convert(hr.mode), hr.size)), to_tensor(hr)) for image in (lr, sr))
    assert rows_of(out)["lr.png"] == pytest.approx([*a, *b, b.y - a.y, b.rgb - a.rgb], abs=6e-4)
    assert sr.size == (90, 90)
    assert Image.open("lr_srcnn_x3_comparison.png").width == 4 * hr.width + 3 * 8


def test_the_shares_of_all_processes_are_one_table(capsys):
    a, b, c = (Scores(Psnr(20, 20), Psnr(value, 20)) for value in (21.0, 23.0, 25.0))
    with pytest.raises(CommandError, match=r"^1 of 7 images failed$"):
        summarize([Share({"a": a, "c": c}, ["x: damaged"], 1), Share({"b": b}, [], 2)], Path("in/hr"), 7, 3661.2)
    out, err = capsys.readouterr()
    assert [(name, row[2]) for name, row in rows_of(out).items()] == [("a", 21), ("b", 23), ("c", 25), ("hr", 23)]
    assert out.endswith("\n3 of 7 images upscaled in 1:01:01, 3 were there already\n")
    assert err == "error: x: damaged\n"


def test_between_pipes_there_is_nothing_but_the_image(pictures):
    lr, _, model = pictures
    command = [sys.executable, ROOT / "super_resolve.py", *COMMAND[1:], "-", "--format=tif"]
    with open("lr.bmp", "rb") as file:
        process = subprocess.run(command, stdin=file, capture_output=True, timeout=1200)
    assert process.stderr.startswith(b"-: 30x30 -> 90x90 in ")
    sr = Image.open(io.BytesIO(process.stdout))
    assert sr.format == "TIFF"
    assert_same(sr, expected(model, lr))


def test_what_standard_input_cannot_be(cli, pictures, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(17))))
    for limit, problem in ((1, "-: more than 16 bytes are too many"), (2, "-: not an image that can be read")):
        status, out, err = cli(*COMMAND, "-", "--output=a.png", f"--max-pixels={limit}")
        assert (status, out) == (1, "")
        assert_one_line(err, problem)
        sys.stdin.buffer.seek(0)


# ------------------------------------------------------------------------------- in Python


def test_upscale_returns_the_kind_that_it_is_given(pictures, monkeypatch):
    lr, _, model = pictures
    upscaler = load_upscaler("net", precision="fp32")
    for image in (lr, lr.convert("L"), lr.convert("LA"), lr.convert("RGBA"), random_image("I;16")):
        sr, array = upscale(image, upscaler), upscale(np.array(image), upscaler)
        assert (sr.mode, sr.size) == (image.mode, (3 * image.width, 3 * image.height))
        assert np.array_equal(array, sr)
        assert array.dtype == np.array(image).dtype
    palette = lr.quantize(9)
    assert_same(upscale(palette, upscaler), expected(model, palette.convert("RGB")))
    for array in (np.zeros((3, 9, 9), np.uint8), np.zeros((9, 9)), np.zeros((9, 0), np.uint8), np.zeros(9, np.uint8)):
        with pytest.raises(ValueError, match="an image is uint8 of shape"):
            upscale(array, upscaler)
    assert np.array_equal(upscale(lr), load_upscaler()(lr))
    monkeypatch.setattr(super_resolve, "load_checkpoint", None)  # it is loaded once
    upscale(lr)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("missing.bmp", "missing.bmp: no such file"),
        ("lr.bmp --ground-truth=small.png", "small.png: 89x90 is not three times 30x30"),
        ("lr.bmp --ground-truth=large.png", "large.png: 90x93 is not three times 30x30"),
        ("dot.png --ground-truth=lr.png", "lr.png: 3x3 pixels are too few"),
        ("lr.bmp --output=nowhere/a.bmp", "cannot write nowhere/a.bmp: no such folder"),
    ],
)
@pytest.mark.usefixtures("pictures")
def test_bad_input_is_one_clear_line(cli, arguments, problem):
    for name, size in (("small.png", (89, 90)), ("large.png", (90, 93)), ("dot.png", (1, 1)), ("lr.png", (3, 3))):
        Image.new("RGB", size).save(name)
    before = contents()
    status, out, err = cli(*COMMAND, *arguments.split())
    assert (status, out) == (1, "")
    assert_one_line(err, "error: ", problem)
    assert contents() == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["x", "--tile=0"], "--tile: must be a positive integer"),
        (["x", "--max-pixels=-3"], "--max-pixels: must be a positive integer"),
        (["x", "--precision=fp16"], "--precision: invalid choice: 'fp16'"),
        (["x", "--ground-truth="], "--ground-truth: must not be empty"),
        (["x", "--output="], "--output: must not be empty"),
        (["x", "--checkpoint="], "--checkpoint: must not be empty"),
        ([""], "INPUT: must not be empty"),
        (["\0"], "INPUT: must not contain a null character"),
        (["x", "--checkpoint=net", "--a\nb"], "unrecognized arguments: --a\\nb"),
        (["x", "--format=jp2"], "--format: invalid choice: 'jp2'"),
        (["--checkpoint=net"], "required: INPUT"),
    ],
)
def test_wrong_options_are_a_usage_error(cli, arguments, problem):
    status, out, err = cli("super_resolve.py", *arguments)
    assert (status, out) == (2, "")
    assert_one_line(err, problem, "super_resolve.py --help")


# ---------------------------------------------------------------------- files and start-up


def test_names_are_shown_escaped(cli, pictures):
    pictures[0].save("red\x1b[31m\udcff.bmp")
    assert cli(*COMMAND, "red\x1b[31m\udcff.bmp")[1].startswith("red\\x1b[31m\\udcff_srcnn_x3.bmp: 30x30")


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_a_full_disk_leaves_nothing_half_written(cli, ending):
    """Writing stops at a size a little below that of the file."""
    assert cli(*COMMAND, "lr.bmp", f"--output=o.{ending}")[0] == 0
    before = contents()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[f"o.{ending}"]) - 100, limits[1]))
    try:
        status, out, err = cli(*COMMAND, "lr.bmp", f"--output=o.{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, out) == (1, "")
    assert_one_line(err, f"cannot write o.{ending}: File too large")
    assert contents() == before


def test_it_starts_about_as_fast_as_torch_does():
    """Since it imports nothing that it does not need."""
    code = """if True:
        import sys, time
        start = time.process_time()
        import torch
        middle = time.process_time()
        import super_resolve
        share = (time.process_time() - middle) / (middle - start)
        print(share, *{"train", "tensorboard", "torchvision"} & {*sys.modules})"""
    share, *imported = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not imported
    assert float(share) < 0.4
