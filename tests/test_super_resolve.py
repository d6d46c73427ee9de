"""The command super_resolve.py and its function upscale."""

import importlib.util
import io
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SRGB,
    assert_one_line,
    assert_same,
    content,
    contents,
    expected,
    random_image,
    rows_of,
    trained_model,
)
from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo
from processes import run_script

import super_resolve
from imaging.formats import FORMATS
from imaging.images import bicubic, flatten, to_tensor
from imaging.metrics import Quality, Scores, gain, measure
from model import SCALES, SRCNN
from super_resolve import Results, load_upscaler, summarize, upscale
from upscaling import pipeline
from utils import CommandError

COMMAND = ("super_resolve.py", "--precision=fp32", "--checkpoint=net")


# ----------------------------------------------------------------------------- one image


@pytest.mark.parametrize("scale", SCALES)
def test_command_writes_output_beside_input_and_nothing_else(cli, pictures, scale):
    lr, _, model = pictures
    side, name = 30 * scale, f"lr_srcnn_x{scale}.bmp"
    before = contents()
    status, out, err = cli(*COMMAND, "lr.bmp")
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"{name}: 30x30 -> {side}x{side} in [\d.]+ s on cpu, fp32\n", out)
    with Image.open(name) as sr:
        assert sr.format == "BMP"
        assert_same(sr, expected(model, lr))
    after = contents()
    del after[name]
    assert after == before


@pytest.mark.parametrize(("options", "scale"), [([], 3), (["--scale=2"], 2), (["--scale=3"], 3), (["--scale=4"], 4)])
def test_shipped_checkpoint_of_scale_is_default(cli, pictures, options, scale):
    assert cli("super_resolve.py", "--precision=fp32", "lr.bmp", *options)[0] == 0
    assert_same(Image.open(f"lr_srcnn_x{scale}.bmp"), expected(trained_model(scale), pictures[0]))


@pytest.mark.parametrize(("args", "scale"), [({"scale": 2}, 2), ({"scale": 3}, 3), ({}, 3)])
def test_scale_that_agrees_with_checkpoint_may_be_given(cli, pictures, args, scale):
    """Checkpoints without a scale, such as those of the course, are for x3."""
    torch.save(content(args=args), "x")
    for option in ([], [f"--scale={scale}"]):
        assert cli("super_resolve.py", "--checkpoint=x", "lr.bmp", f"--output={scale}.png", *option)[0] == 0
        assert Image.open(f"{scale}.png").size == (30 * scale, 30 * scale)


def test_scale_that_contradicts_checkpoint_is_refused(cli, pictures):
    before = contents()
    status, out, err = cli(*COMMAND, "lr.bmp", "--scale=2")
    assert (status, out) == (1, "")
    assert err == "error: --scale=2 contradicts --checkpoint=net, which is for x3; remove one of them\n"
    assert contents() == before


@pytest.mark.parametrize(("scale", "name"), [(2, "checkpoints/x2.pth"), (3, "checkpoint.pth")])
def test_missing_shipped_checkpoint_is_reported(cli, pictures, monkeypatch, tmp_path, scale, name):
    monkeypatch.setattr(super_resolve, "FOLDER", tmp_path)
    status, _, err = cli("super_resolve.py", "lr.bmp", f"--scale={scale}")
    assert status == 1
    assert_one_line(err, f"error: {tmp_path / name}: the checkpoint for x{scale} is missing; ", "--checkpoint=FILE")


@pytest.mark.parametrize(
    ("scale", "name"), [((), "checkpoint.pth"), ((2,), "checkpoints/x2.pth"), ((4,), "checkpoints/x4.pth")]
)
def test_link_to_the_program_uses_the_checkpoints_beside_the_program(scale, name):
    Path("link.py").symlink_to(ROOT / "super_resolve.py")
    spec = importlib.util.spec_from_file_location("link", "link.py")
    linked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked)
    assert linked.shipped_checkpoint(*scale).samefile(ROOT / name)


def test_file_names_are_printed_escaped(cli, pictures):
    pictures[0].save("red\x1b[31m\udcff.bmp")
    assert cli(*COMMAND, "red\x1b[31m\udcff.bmp")[1].startswith("red\\x1b[31m\\udcff_srcnn_x3.bmp: 30x30")


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("extension", ["jpg", "tif"])
def test_full_disk_keeps_existing_file(cli, extension):
    """The limit of the file size is a little below the size of the output."""
    assert cli(*COMMAND, "lr.bmp", f"--output=o.{extension}")[0] == 0
    before = contents()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[f"o.{extension}"]) - 100, limits[1]))
    try:
        status, out, err = cli(*COMMAND, "lr.bmp", f"--output=o.{extension}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, out) == (1, "")
    assert_one_line(err, f"cannot write o.{extension}: File too large")
    assert contents() == before


def test_pipes_carry_only_the_image(pictures):
    lr, _, model = pictures
    command = [sys.executable, ROOT / "super_resolve.py", *COMMAND[1:], "-", "--format=tif"]
    with open("lr.bmp", "rb") as file:
        process = subprocess.run(command, stdin=file, capture_output=True, timeout=1200)
    assert process.stderr.startswith(b"-: 30x30 -> 90x90 in ")
    sr = Image.open(io.BytesIO(process.stdout))
    assert sr.format == "TIFF"
    assert_same(sr, expected(model, lr))


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(
    ("max_pixels", "problem"), [(1, "-: standard input exceeds the limit of 16 bytes"), (2, "-: not an image")]
)
def test_standard_input_that_is_too_long_or_no_image_is_refused(cli, monkeypatch, max_pixels, problem):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(17))))
    status, out, err = cli(*COMMAND, "-", "--output=a.png", f"--max-pixels={max_pixels}")
    assert (status, out) == (1, "")
    assert_one_line(err, problem)


# ------------------------------------------------------------------------ several images


def test_invalid_image_is_reported_last_and_others_are_upscaled(cli, pictures):
    Path("in").mkdir()
    for name in ("b.png", "a.jpg"):
        pictures[0].save(f"in/{name}")
    Path("in/aa.png").write_bytes(b"\x89PNG\r\n")
    status, out, err = cli(*COMMAND, "lr.bmp", "in", "--output=o/p")
    assert status == 1
    failure, total = err.splitlines()
    assert failure.startswith("error: in/aa.png: not an image")
    assert total == "error: 1 of 4 images failed"
    names = ["lr_srcnn_x3.bmp", "a_srcnn_x3.jpg", "b_srcnn_x3.png"]
    *lines, summary = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"o/p/{name}" for name in names]
    assert re.fullmatch(r"3 of 4 images upscaled in 0:\d\d:\d\d", summary)
    assert sorted(os.listdir("o/p")) == sorted(names)


def test_impossible_output_fails_before_upscaling_and_stops_no_other(cli, pictures, monkeypatch):
    names = ["a.jpg", "a.png", "deep/a.png", f"{'x' * 250}.png"]
    Path("deep").mkdir()
    for name in names:
        pictures[0].save(name)
    read, image_read = [], pipeline.read_image
    monkeypatch.setattr(pipeline, "read_image", lambda file, *args: read.append(str(file)) or image_read(file))
    status, _, err = cli(*COMMAND, *names, "--format=png", "--output=o", "--skip-existing")
    assert (status, read) == (1, names[:2])
    same, long, total = err.splitlines()
    assert same.startswith("error: deep/a.png: o/a.png_srcnn_x3.png is also the output of a.png; ")
    assert long == f"error: cannot write o/{'x' * 250}_srcnn_x3.png: its name is too long; use a shorter one"
    assert total == "error: 2 of 4 images failed"
    assert sorted(os.listdir("o")) == ["a.jpg_srcnn_x3.png", "a.png_srcnn_x3.png"]


@pytest.fixture
def batch(pictures):
    """Return the command for three images in the tree "in", whose ground truths are in "hr"."""
    for name in ("a", "sub/a", "sub/deeper/b"):
        for image, folder in zip(pictures[:2], ("in", "hr"), strict=True):
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            image.save(f"{folder}/{name}.png")
    return (*COMMAND, "in", "--recursive", "--skip-existing", "--output=o")


def test_skip_existing_upscales_only_missing_outputs(cli, batch):
    Path("o/sub").mkdir(parents=True)
    Path("o/sub/a_srcnn_x3.png").write_text("existing")
    status, out, err = cli(*batch)
    assert (status, err) == (0, "")
    assert re.search(r"^2 of 3 images upscaled in 0:\d\d:\d\d, 1 image already had an output$", out, re.M)
    assert Path("o/sub/a_srcnn_x3.png").read_text() == "existing"
    assert Image.open("o/sub/deeper/b_srcnn_x3.png").size == (90, 90)


def test_skip_existing_upscales_images_without_comparison_again(cli, batch):
    assert cli(*batch)[0] == 0
    out = cli(*batch)[1]
    assert re.fullmatch(r"0 of 3 images upscaled in 0:\d\d:\d\d, 3 images already had an output\n", out)
    out = cli(*batch, "--ground-truth=hr")[1]
    assert list(rows_of(out)) == ["in/a.png", "in/sub/a.png", "in/sub/deeper/b.png", "hr"]


def test_summary_combines_results_of_all_processes(capsys):
    a, b, c = (Scores(Quality(20, 20, 0.5), Quality(value, 20, 0.5)) for value in (21.0, 23.0, 25.0))
    results = [Results({"a": a, "c": c}, ["x: damaged"], 1), Results({"b": b}, [], 2)]
    with pytest.raises(CommandError, match=r"^1 of 7 images failed$"):
        summarize(results, Path("in/hr"), 7, 3661.2)
    out, err = capsys.readouterr()
    assert [(name, row[3]) for name, row in rows_of(out).items()] == [("a", 21), ("b", 23), ("c", 25), ("hr", 23)]
    assert out.endswith("\n3 of 7 images upscaled in 1:01:01, 3 images already had an output\n")
    assert err == "error: x: damaged\n"


def transparent(lr, hr):
    mask = Image.new("L", (90, 90))
    mask.paste(255, (9, 9, 60, 60))
    for image in (lr, hr):
        image.putalpha(mask.resize(image.size))
    return lr, hr


@pytest.mark.parametrize(
    ("change", "scale", "warning"),
    [
        (transparent, 3, ""),
        (lambda lr, hr: (lr.convert("L"), hr.convert("L")), 3, ""),
        (lambda lr, hr: (lr, hr.convert("L")), 2, ""),
        (lambda lr, hr: (lr.convert("L"), hr), 3, ""),
        # The course made its LR images without cropping: 256 -> 85, so 3 x 85 is one less than 256.
        (lambda lr, hr: (lr, bicubic(hr, (92, 91))), 3, "WARNING: the ground truth has 92x91 pixels"),
        (lambda lr, hr: (lr, bicubic(hr, (120, 123))), 4, "WARNING: the ground truth has 120x123 pixels"),
    ],
    ids=["transparent", "both gray", "gray HR", "gray LR", "larger HR", "larger HR at x4"],
)
def test_psnr_is_measured_in_mode_and_size_of_ground_truth(cli, pictures, change, scale, warning):
    for image, name in zip(change(*pictures[:2]), ("lr.png", "hr.png"), strict=True):
        image.save(name)
    status, out, err = cli(*COMMAND, "lr.png", "--ground-truth=hr.png")
    assert (status, err.count("\n")) == (0, bool(warning))
    assert err.startswith(warning)
    lr, sr, hr = (flatten(Image.open(file)) for file in ("lr.png", f"lr_srcnn_x{scale}.png", "hr.png"))
    a, b = (measure(to_tensor(bicubic(image.convert(hr.mode), hr.size)), to_tensor(hr), scale) for image in (lr, sr))
    assert rows_of(out)["lr.png"] == pytest.approx([*a, *b, *gain(Scores(a, b))], abs=6e-4)
    assert sr.size == (30 * scale, 30 * scale)
    assert Image.open(f"lr_srcnn_x{scale}_comparison.png").width >= 4 * hr.width + 3 * 8


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("missing.bmp", "missing.bmp: no such file"),
        ("lr.bmp --ground-truth=small.png", "small.png: 89x90 is not 3 times 30x30\n"),
        ("lr.bmp --ground-truth=large.png", "large.png: 90x93 is not 3 times 30x30\n"),
        (
            "lr.bmp --ground-truth=hr2.png",
            "hr2.png: 60x61 is not 3 times 30x30; it fits x2, so use a checkpoint for that\n",
        ),
        ("dot.png --ground-truth=lr.png", "lr.png: 3x3"),
        ("lr.bmp --output=nowhere/a.bmp", "nowhere/a.bmp: no such folder"),
    ],
)
@pytest.mark.usefixtures("pictures")
def test_invalid_input_is_reported_in_one_line_and_writes_nothing(cli, arguments, problem):
    sizes = {"small": (89, 90), "large": (90, 93), "hr2": (60, 61), "dot": (1, 1), "lr": (3, 3)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(f"{name}.png")
    before = contents()
    status, out, err = cli(*COMMAND, *arguments.split())
    assert (status, out) == (1, "")
    assert_one_line(err, "error: ", problem)
    assert contents() == before


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("scale", [4])
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("wide.png --format=jpg", "wide_srcnn_x4.jpg: 65536x4 pixels is too large for JPEG; "),
        ("dot.png --ground-truth=small.png", "small.png: 11x11 pixels is too small; the minimum is 12x12"),
    ],
)
def test_limits_of_size_depend_on_scale(cli, scale, arguments, problem):
    for name, size in (("wide.png", (16384, 1)), ("dot.png", (2, 2)), ("small.png", (11, 11))):
        Image.new("L", size).save(name)
    status, out, err = cli(*COMMAND, *arguments.split())
    assert (status, out) == (1, "")
    assert_one_line(err, problem)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["x", "--tile=0"], "--tile: must be a positive integer"),
        (["x", "--max-pixels=-3"], "--max-pixels: must be a positive integer"),
        (["x", "--precision=fp16"], "--precision: invalid choice: 'fp16'"),
        (["x", "--output="], "--output: must not be empty"),
        (["x", "--checkpoint="], "--checkpoint: must not be empty"),
        ([""], "INPUT: must not be empty"),
        (["x", "--checkpoint=net", "--a\nb"], "unrecognized arguments: --a\\nb"),
        (["x", "--scale=5"], "--scale: invalid choice: 5"),
        (["x", "--scale=big"], "--scale: must be a positive integer (below 2^31), not 'big'"),
        (["x", "--format=jp2"], "--format: invalid choice: 'jp2'"),
        (["--checkpoint=net"], "required: INPUT"),
    ],
)
def test_invalid_option_is_usage_error(cli, arguments, problem):
    status, out, err = cli("super_resolve.py", *arguments)
    assert (status, out) == (2, "")
    assert_one_line(err, problem, "super_resolve.py --help")


# --------------------------------------------------------------------------- from Python


@pytest.mark.parametrize(
    ("mode", "scale"), [("RGB", 3), ("L", 3), ("LA", 3), ("RGBA", 3), ("I;16", 3), ("RGBA", 2), ("I;16", 4)]
)
def test_upscale_accepts_images_and_arrays_and_returns_same_kind(pictures, mode, scale):
    upscaler, image = load_upscaler("net", precision="fp32"), random_image(mode)
    sr, array = upscale(image, upscaler), upscale(np.array(image), upscaler)
    assert (sr.mode, sr.size) == (image.mode, (scale * image.width, scale * image.height))
    assert np.array_equal(array, sr)
    assert array.dtype == np.array(image).dtype


def test_upscale_converts_palette_images_to_rgb(pictures):
    lr, _, model = pictures
    palette = lr.quantize(9)
    sr = upscale(palette, load_upscaler("net", precision="fp32"))
    assert_same(sr, expected(model, palette.convert("RGB")))


@pytest.mark.parametrize(("shape", "dtype"), [((3, 9, 9), "uint8"), ((9, 9), float), ((9, 0), "uint8"), (9, "uint8")])
def test_upscale_refuses_arrays_that_are_not_images(shape, dtype):
    with pytest.raises(ValueError, match="an array must be uint8 of shape"):
        upscale(np.zeros(shape, dtype))


@pytest.mark.parametrize("image", ["lr.png", Path("lr.png"), b"lr.png", [[1, 2]], None], ids=repr)
def test_upscale_refuses_paths_and_other_types(image):
    with pytest.raises(TypeError, match=f"not {type(image).__name__}; open a file with PIL.Image.open first"):
        upscale(image)


@pytest.mark.parametrize("wrong", [0, 1, True, 5, "2", 2.0, 3.0, [2]])
def test_scale_that_does_not_exist_is_refused(pictures, wrong):
    for call in (lambda: upscale(pictures[0], scale=wrong), lambda: load_upscaler("net", scale=wrong)):
        with pytest.raises(ValueError, match=re.escape("scale must be one of 2, 3, 4, not ")):
            call()


def test_precision_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"^precision must be one of auto, fp32, bf16, not 'fp16'$"):
        load_upscaler(precision="fp16")


def test_scale_may_be_a_numpy_integer(pictures):
    assert upscale(pictures[0], scale=np.int64(2)).size == (60, 60)


@pytest.mark.parametrize("wrong", [2, 0, "net", SRCNN()], ids=["scale", "zero", "path", "network"])
def test_upscaler_of_another_type_is_refused(pictures, wrong):
    with pytest.raises(TypeError, match=r"^the upscaler must come from load_upscaler, not "):
        upscale(pictures[0], wrong)


def test_file_of_another_scale_in_place_of_a_shipped_one_is_refused(cli, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(super_resolve, "FOLDER", tmp_path)
    torch.save(content(args={"scale": 4}), "checkpoint.pth")
    for option in ([], ["--scale=3"]):
        status, _, err = cli("super_resolve.py", "lr.bmp", *option)
        assert status == 1
        assert_one_line(
            err,
            f"error: {tmp_path / 'checkpoint.pth'} is for x4, so it is not the one shipped for x3; use --checkpoint",
        )


def test_scale_that_contradicts_upscaler_is_refused(pictures):
    upscaler = load_upscaler("net", scale=3)
    assert np.array_equal(upscale(pictures[0], upscaler, scale=3), upscale(pictures[0], upscaler))
    with pytest.raises(ValueError, match=r"^scale=2 contradicts the upscaler, which upscales by 3; "):
        upscale(pictures[0], upscaler, scale=2)


def rich_image(name):
    """Write an image with all metadata that is kept."""
    exif = Image.Exif()
    exif.update({Base.Orientation: 6, Base.XResolution: 300.0, Base.YResolution: 150.0, Base.ResolutionUnit: 2})
    exif.get_ifd(IFD.Exif).update({Base.ExifImageWidth: 24, Base.ExifImageHeight: 15})
    chunks = PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", 45000))
    chunks.add(b"cICP", bytes([9, 16, 0, 1]))
    random_image().save(name, exif=exif, icc_profile=SRGB, dpi=(300, 150), pnginfo=chunks)


OPTIONS = {"png": {"compress_level": 1}, "jpg": {"quality": 95, "subsampling": 0}, "tif": {}}
OPTIONS["webp"] = {"quality": 96, "method": 2}


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("extension", OPTIONS)
def test_result_of_upscale_is_saved_as_command_saves_it(cli, extension):
    name = f"in.{extension}"
    rich_image(name)
    assert cli(*COMMAND, name)[0] == 0
    with Image.open(name) as image:
        sr = upscale(image, load_upscaler("net", precision="fp32"))
    kept = {key: value for key, value in sr.info.items() if extension != "tif" or key != "exif"}
    sr.save(f"out.{extension}", **OPTIONS[extension], **kept)
    assert Path(f"out.{extension}").read_bytes() == Path(f"in_srcnn_x3.{extension}").read_bytes()


@pytest.mark.parametrize("scale", SCALES)
def test_result_of_upscale_has_metadata_of_its_size(pictures, scale):
    rich_image("in.png")
    with Image.open("in.png") as image:
        sr = upscale(image, load_upscaler("net", precision="fp32"))
    exif, details = sr.getexif(), sr.getexif().get_ifd(IFD.Exif)
    assert sr.size == (details[Base.ExifImageWidth], details[Base.ExifImageHeight]) == (15 * scale, 24 * scale)
    resolution = 150 * scale, 300 * scale
    assert (exif[Base.Orientation], exif[Base.XResolution], exif[Base.YResolution]) == (1, *resolution)
    assert sr.info.keys() == {"icc_profile", "exif", "dpi", "pnginfo"}
    assert sr.info["dpi"] == pytest.approx(resolution, abs=0.05)
    sr.save("out.png")
    with Image.open("out.png") as image:
        assert image.info == {"icc_profile": SRGB}
    for format in FORMATS:
        sr.save("out", format, **sr.info)


def test_image_that_is_upscaled_twice_keeps_its_metadata(pictures):
    upscaler = load_upscaler("net", precision="fp32")
    rich_image("in.png")
    with Image.open("in.png") as image:
        once = upscale(image, upscaler)
    twice = upscale(once, upscaler)
    assert twice.info["pnginfo"].chunks == once.info["pnginfo"].chunks
    assert (twice.info["icc_profile"], twice.info["dpi"]) == (SRGB, pytest.approx((1350, 2700), abs=0.2))
    assert twice.getexif()[Base.XResolution] == 1350


def test_result_of_upscale_is_not_transparent_twice(pictures):
    random_image("P").save("in.png", transparency=7)
    with Image.open("in.png") as image:
        sr = upscale(image, load_upscaler("net", precision="fp32"))
    assert (sr.mode, sr.info) == ("RGBA", {})


@pytest.mark.parametrize("scale", SCALES)
def test_upscale_loads_shipped_checkpoint_once(pictures, monkeypatch, scale):
    lr = pictures[0].crop((0, 0, 9, 9))
    assert np.array_equal(upscale(lr, scale=scale), load_upscaler(scale=scale)(lr))
    assert np.array_equal(upscale(lr), load_upscaler()(lr))
    monkeypatch.setattr(super_resolve, "load_checkpoint", None)
    assert [upscale(lr, scale=number).width for number in (None, scale)] == [27, 9 * scale]


def test_import_does_not_load_training_dependencies():
    status, modules, _ = run_script(ROOT / "tests/scripts/print_modules_of_super_resolve.py", folder=ROOT)
    assert status == 0
    assert "super_resolve" in modules.split()
    assert not {"train", "tensorboard"} & set(modules.split())
