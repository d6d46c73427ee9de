import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line
from PIL import Image
from test_utils import checkpoint, skeleton_checkpoint

import data
import model as model_module
import super_resolve
import utils
from model import SRCNN, Folded, bands


@pytest.fixture
def pictures(tmp_path):
    """An LR image, its ground truth, and a network that does more than bicubic."""
    lr, hr = data.degrade(data.dead_leaves("test", 1, 90)[0][1])
    lr.save("lr.bmp")
    hr.save("hr.png")
    torch.manual_seed(1)
    model = SRCNN()
    model.conv3.weight.data[range(3), range(3), 2, 2] = 0.9
    utils.save_checkpoint(tmp_path / "net", checkpoint(model=model.state_dict()))
    return lr, hr, model


def expected(model, lr):
    with torch.inference_mode():
        sr = model(torch.from_numpy(np.array(lr)).permute(2, 0, 1)[None] / 255)[0]
    return (sr.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


def test_it_writes_the_networks_output_beside_the_input(cli, pictures, tmp_path):
    lr, _, model = pictures
    before = (tmp_path / "lr.bmp").read_bytes()
    status, out, err = cli("super_resolve.py", "--precision=fp32", "--checkpoint", "net", "lr.bmp")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"lr_srcnn_x3\.bmp: 30x30 -> 90x90 in [\d.]+ s on cpu, float32\n", out)
    with Image.open("lr_srcnn_x3.bmp") as sr:
        assert sr.format == "BMP"
        assert_same(sr, expected(model, lr))
    assert (tmp_path / "lr.bmp").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hr.png", "lr.bmp", "lr_srcnn_x3.bmp", "net"]


def assert_same(image, wanted):
    """Equal but for roundings: the command works in tiles and in another order."""
    difference = abs(np.asarray(image).astype(int) - np.asarray(wanted))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(("ending", "format"), [("png", "PNG"), ("jpg", "JPEG"), ("tif", "TIFF"), ("webp", "WEBP")])
def test_the_output_has_the_inputs_format(cli, pictures, tmp_path, ending, format):
    lr, _, model = pictures
    (tmp_path / "deep").mkdir()
    lr.save(f"deep/a.b.{ending}", lossless=True, quality=100)
    assert cli("super_resolve.py", "--precision=fp32", f"deep/a.b.{ending}", "--checkpoint=net")[0] == 0
    with Image.open(f"deep/a.b_srcnn_x3.{ending}") as sr:
        assert (sr.format, sr.size) == (format, (90, 90))
        difference = abs(np.asarray(sr).astype(int) - expected(model, Image.open(f"deep/a.b.{ending}").convert("RGB")))
    assert difference.mean() < (4 if format in ("JPEG", "WEBP") else 1e-3)


def test_output_may_be_named(cli, pictures, tmp_path):
    lr, _, model = pictures
    assert cli("super_resolve.py", "--precision=fp32", "lr.bmp", "--checkpoint=net", "--output=big.png")[0] == 0
    with Image.open("big.png") as sr:
        assert sr.format == "PNG"
        assert_same(sr, expected(model, lr))
    assert not (tmp_path / "lr_srcnn_x3.bmp").exists()


def test_ground_truth_gives_the_psnr_and_a_labelled_picture(cli, pictures):
    lr, hr, model = pictures
    status, out, err = cli(
        "super_resolve.py", "--precision=fp32", "--checkpoint=net", "lr.bmp", "--ground-truth", "hr.png"
    )
    assert (status, err) == (0, "")
    up, sr = data.bicubic(lr, 90, 90), Image.open("lr_srcnn_x3.bmp")
    assert_same(sr, expected(model, lr))
    for name, image in (("bicubic", up), ("SRCNN", sr)):
        y, rgb = (f(data.to_tensor(image), data.to_tensor(hr)) for f in (utils.psnr_y, utils.psnr_rgb))
        assert re.search(rf"^{name} +{y:.3f} dB Y, {rgb:.3f} dB RGB$", out, re.M)
    assert "lr_srcnn_x3_comparison.png" in out
    with Image.open("lr_srcnn_x3_comparison.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == 4 * 90 + 3 * 8
    panels = [lr.resize((90, 90), Image.Resampling.NEAREST), up, sr, hr]
    for i, panel in enumerate(panels):
        label, picture = np.split(pixels[:, i * 98 : i * 98 + 90], [-90])
        assert np.array_equal(picture, panel)
        assert (label < 128).any()  # there is text above it
        assert (label > 128).mean() > 0.7


def test_a_label_is_never_cut_off():
    """Text ends before its panel does, for the narrowest images too."""
    for width in (30, 90, 300):
        image = Image.new("RGB", (width, 40), "black")
        sheet = np.asarray(super_resolve.side_by_side({"ground truth\n9999 x 9999": image, "LR": image}))
        panel = (sheet.shape[1] - 8) // 2
        label = sheet[: sheet.shape[0] - 40, : panel + 8]
        assert (label[:, panel:] == 255).all()


def test_the_courses_examples_work_as_they_are(cli, pictures, image_examples):
    """Their LR images were made without cropping: 256 -> 85, so 3 x 85 is one less than 256."""
    status, out, err = cli(
        "super_resolve.py", "--precision=fp32", "--checkpoint=net", image_examples / "butterfly_lr.bmp",
        "--output=sr.bmp", "--ground-truth", image_examples / "butterfly_GT.bmp",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "256x256" in out
    up = Image.open(image_examples / "butterfly_lr.bmp").convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    y = utils.psnr_y(data.to_tensor(up), data.to_tensor(Image.open(image_examples / "butterfly_GT.bmp").convert("RGB")))
    assert f"bicubic  {y:.3f} dB Y" in out
    assert Image.open("sr.bmp").size == (255, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 2)])
def test_small_images(cli, pictures, size):
    image = pictures[0].crop((0, 0, *size))
    image.save("small.png")
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "small.png")[0] == 0
    assert_same(Image.open("small_srcnn_x3.png"), expected(pictures[2], image))


def test_auto_precision_is_the_choice_of_select_dtype(cli, pictures, monkeypatch):
    """And what is chosen is computed and said."""
    context = torch.from_numpy(np.pad(np.array(pictures[0]), ((4, 4), (4, 4), (0, 0)), mode="edge")).permute(2, 0, 1)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(super_resolve, "select_dtype", lambda *args, dtype=dtype: dtype)
        status, out, err = cli("super_resolve.py", "--checkpoint=net", "lr.bmp")
        assert (status, err) == (0, "")
        assert out.endswith(f" s on cpu, {str(dtype)[6:]}\n")
        with torch.inference_mode():
            wanted = Folded(pictures[2], dtype, fine=True)(context[None])[0].clamp(0, 255).round()
        assert np.array_equal(np.array(Image.open("lr_srcnn_x3.bmp")), wanted.permute(1, 2, 0).byte().numpy())


@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_any_tile_gives_the_same_image(cli, pictures, tile, monkeypatch):
    tiles = []
    monkeypatch.setattr(super_resolve, "bands", lambda *args: tiles.append(args[3]) or bands(*args))
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", f"--tile={tile}", "lr.bmp")[0] == 0
    assert tiles == [tile]
    assert_same(Image.open("lr_srcnn_x3.bmp"), expected(pictures[2], pictures[0]))


def test_one_thread_gives_the_same_image(pictures):
    command = [sys.executable, str(ROOT / "super_resolve.py"), "--precision=fp32", "--checkpoint=net", "lr.bmp"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)
    assert_same(Image.open("lr_srcnn_x3.bmp"), expected(pictures[2], pictures[0]))


def test_precision_that_the_processor_is_slow_with_is_refused(cli, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(model_module, "_seconds", {torch.float32: 1.0, torch.bfloat16: 1.2}.get)
    status, out, err = cli("super_resolve.py", "--precision=bf16", "--checkpoint=net", "lr.bmp")
    assert (status, out) == (1, "")
    assert_one_line(err, "not distinctly faster with bf16", "--precision=fp32")
    assert not (tmp_path / "lr_srcnn_x3.bmp").exists()


@pytest.mark.parametrize("option", ["--tile=0", "--tile=-3", "--tile=x", "--precision=fp16", "--precision="])
def test_a_wrong_option_is_a_usage_error(cli, pictures, option):
    status, out, err = cli("super_resolve.py", "--checkpoint=net", "lr.bmp", option)
    assert (status, out) == (2, "")
    assert_one_line(err, option.split("=")[0], "must be")


def test_a_checkpoint_of_the_course_serves(cli, pictures):
    skeleton_checkpoint(
        "legacy", model_state_dict={f"net.{i}": w for i, w in enumerate(pictures[2].state_dict().values())}
    )
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=legacy", "lr.bmp")[0] == 0
    assert_same(Image.open("lr_srcnn_x3.bmp"), expected(pictures[2], pictures[0]))


def test_bad_input_is_one_clear_line(cli, pictures, tmp_path):
    (tmp_path / "text.bmp").write_text("not an image")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "lr.bmp").read_bytes()[:500])
    (tmp_path / "lr.xyz").write_bytes((tmp_path / "lr.bmp").read_bytes())
    Image.new("RGB", (50, 50)).save("other.png")
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    cases = [
        (1, ["missing.bmp", "--checkpoint=net"], ["missing.bmp", "no such file"]),
        (1, ["text.bmp", "--checkpoint=net"], ["text.bmp", "not an image"]),
        (1, ["cut.bmp", "--checkpoint=net"], ["cut.bmp", "not an image"]),
        (1, ["lr.xyz", "--checkpoint=net"], ["lr_srcnn_x3.xyz", "--output"]),
        (1, ["lr.bmp", "--checkpoint=missing"], ["missing", "no such checkpoint"]),
        (1, ["lr.bmp", "--checkpoint=text.bmp"], ["text.bmp", "damaged"]),
        (1, ["lr.bmp", "--checkpoint=net", "--ground-truth=missing.png"], ["missing.png", "no such file"]),
        (1, ["lr.bmp", "--checkpoint=net", "--ground-truth=other.png"], ["50x50", "three times 30x30"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=lr.bmp"], ["lr.bmp is an input"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=nowhere/a.bmp"], ["nowhere/a.bmp", "No such file or directory"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=lr.bmp/a.bmp"], ["lr.bmp/a.bmp", "Not a directory"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=."], [". is no file"]),
        (1, [".", "--checkpoint=net"], [". is no file"]),
        (2, ["lr.bmp", "--checkpoint=net", "--a\nb"], ["--a\\nb"]),
        (2, ["lr.bmp"], ["--checkpoint"]),
        (2, ["--checkpoint=net"], ["image"]),
        (2, ["lr.bmp", "--checkpoint=net", "--scale=4"], ["--scale"]),
    ]
    if not torch.cuda.is_available():
        cases.append((1, ["lr.bmp", "--checkpoint=net", "--cuda"], ["no CUDA device"]))
    for wanted, arguments, says in cases:
        status, out, err = cli("super_resolve.py", "--precision=fp32", *arguments)
        assert (status, out) == (wanted, ""), arguments
        assert_one_line(err, *says)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files, arguments


def test_names_that_the_terminal_cannot_show(pictures, tmp_path):
    (tmp_path / "é\udcff.bmp").write_bytes((tmp_path / "lr.bmp").read_bytes())
    command = [sys.executable, str(ROOT / "super_resolve.py"), "--checkpoint=net", "é\udcff.bmp"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    end = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert end.stdout.startswith(rb"\xe9\udcff_srcnn_x3.bmp: 30x30")
    closed = subprocess.run(["sh", "-c", f"{shlex.join(command[:3])} lr.bmp >&-"], capture_output=True, check=True)
    assert closed.stderr == b""
    assert (tmp_path / "lr_srcnn_x3.bmp").exists()


def test_ctrl_c_during_the_imports(pictures):
    process = subprocess.Popen([sys.executable, str(ROOT / "super_resolve.py"), "x"], stderr=subprocess.PIPE)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == -signal.SIGINT  # which a shell shows as 130


def test_it_starts_without_what_it_does_not_need():
    code = "import sys, super_resolve; print(*{'train', 'tensorboard', 'torchvision'} & {*sys.modules})"
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert end.stdout.strip() == ""


@pytest.mark.parametrize("ending", ["bmp", "jpg", "tif"])
def test_a_full_disk_leaves_nothing_half_written(pictures, ending):
    """Writing stops at a size a little below that of the file."""
    command = [sys.executable, str(ROOT / "super_resolve.py"), "--checkpoint=net", "lr.bmp", f"--output=o.{ending}"]
    subprocess.run(command, check=True, timeout=60)
    whole = Path(f"o.{ending}").read_bytes()
    limit = f"import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); \
        resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) - 100},) * 2); \
        sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    end = subprocess.run([command[0], "-c", limit, *command[1:]], capture_output=True, text=True, timeout=60)
    assert end.returncode == 1
    assert_one_line(end.stderr, f"o.{ending}", "File too large")
    assert Path(f"o.{ending}").read_bytes() == whole
    assert not list(Path().glob(".*part"))
