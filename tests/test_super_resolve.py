import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_same, expected
from PIL import Image
from test_utils import skeleton_checkpoint

import data
import model as model_module
import super_resolve
import utils
from model import Folded
from model import super_resolve as upscale_image


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


@pytest.mark.parametrize(("ending", "format"), [("png", "PNG"), ("jpg", "JPEG"), ("tif", "TIFF"), ("webp", "WEBP")])
def test_the_output_has_the_inputs_format(cli, pictures, tmp_path, ending, format):
    lr, _, model = pictures
    (tmp_path / "deep").mkdir()
    lr.save(f"deep/a.b.{ending}", lossless=True, quality=100)
    assert cli("super_resolve.py", "--precision=fp32", f"deep/a.b.{ending}", "--checkpoint=net")[0] == 0
    with Image.open(f"deep/a.b_srcnn_x3.{ending}") as sr:
        assert (sr.format, sr.size) == (format, (90, 90))
        difference = abs(np.asarray(sr) - expected(model, Image.open(f"deep/a.b.{ending}").convert("RGB")).round())
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
    figures = [
        f"{f(data.to_tensor(image), data.to_tensor(hr)):.3f}"
        for image in (up, sr)
        for f in (utils.psnr_y, utils.psnr_rgb)
    ]
    row = "lr.bmp *{} / {} dB *{} / {} dB ".format(*figures)
    assert len(re.findall(row, out)) == 1
    assert "mean" not in out
    assert "lr_srcnn_x3_comparison.png" in out
    with Image.open("lr_srcnn_x3_comparison.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == 4 * 90 + 3 * 8
    panels = [lr.resize((90, 90), Image.Resampling.NEAREST), up, sr, hr]
    red = (pixels == (255, 0, 0)).all(2)
    top, left = (indices.min() for indices in red[:, :98].nonzero())
    label_height = pixels.shape[0] - 90 - 8 - 88
    window = (left, top - label_height, left + 22, top - label_height + 22)
    for i, panel in enumerate(panels):
        label, picture, gap, detail = np.split(pixels[:, i * 98 : i * 98 + 90], np.cumsum([label_height, 90, 8]))
        frame = red[:, i * 98 : i * 98 + 90][label_height : label_height + 90]
        assert frame.sum() == 4 * 21
        assert np.array_equal(picture[~frame], np.asarray(panel)[~frame])
        assert (label < 128).any()  # there is text above it
        assert (label > 128).mean() > 0.7
        assert np.array_equal(detail[:, :88], np.asarray(panel.crop(window)).repeat(4, 0).repeat(4, 1))
        assert (gap == 255).all()
    # In the detail bicubic and SRCNN differ nearly as much as they do anywhere.
    difference = abs(np.asarray(up).astype(int) - np.asarray(sr)).sum(2)
    sums = np.lib.stride_tricks.sliding_window_view(difference, (22, 22)).sum((2, 3))
    assert sums[window[1], window[0]] > 0.98 * sums.max()


def test_a_large_comparison_is_made_smaller_but_for_its_detail():
    hr = Image.new("RGB", (1500, 600), "gray")
    up, sr = hr.copy(), hr.copy()
    up.paste("white", (1210, 410, 1260, 460))  # this is where they differ
    sheet, _ = super_resolve.compare(up.resize((500, 200), Image.Resampling.BOX), sr, up)
    pixels = np.asarray(sheet).astype(int)
    assert sheet.width == 4 * 512 + 3 * 8
    red = (pixels == (255, 0, 0)).all(2)[:, :512]
    left = red.any(0).argmax()
    assert 1170 <= left * 1500 / 512 <= 1215
    detail = pixels[-192:, 512 + 8 :][:, :192]  # of bicubic; 205 // 64 times enlarged
    assert (detail > 200).mean() == pytest.approx((50 / 64) ** 2, abs=0.05)
    assert abs(pixels[-192:, 2 * 520 :][:, :192] - 128).max() == 0  # of what stands for SRCNN


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
    assert re.search(rf"butterfly_lr.bmp *{y:.3f} / ", out)
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


@pytest.mark.parametrize(("tile", "used"), [(1, 1), (7, 7), (1000, 1000), (None, 66)])
def test_any_tile_gives_the_same_image(cli, pictures, tile, used, monkeypatch):
    tiles = []
    monkeypatch.setattr(super_resolve, "super_resolve", lambda *args: tiles.append(args[3]) or upscale_image(*args))
    options = [f"--tile={tile}"] if tile else []
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", *options, "lr.bmp")[0] == 0
    assert set(tiles) == {used}
    assert_same(Image.open("lr_srcnn_x3.bmp"), expected(pictures[2], pictures[0]))


def test_too_little_memory_on_the_gpu_halves_the_tile(cli, pictures, monkeypatch):
    tiles = []

    def small_gpu(model, lr, dtype, tile, self_ensemble):
        tiles.append(tile)
        if tile > 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return upscale_image(model, lr, dtype, tile, self_ensemble)

    monkeypatch.setattr(super_resolve, "super_resolve", small_gpu)
    monkeypatch.setattr(super_resolve, "BLOCK", 20)
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "--tile=20", "lr.bmp")[0] == 0
    assert tiles == [20, 10, 5, 5, 5, 5]  # once for all of the four pieces
    assert_same(Image.open("lr_srcnn_x3.bmp"), expected(pictures[2], pictures[0]))
    monkeypatch.setattr(super_resolve, "super_resolve", lambda *_: small_gpu(*_[:3], 10, False))
    status, _, err = cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "--tile=4", "lr.bmp")
    assert status == 1
    assert_one_line(err, "out of memory", "--tile")


@pytest.mark.parametrize("threads", ["1", "2"])
def test_any_number_of_threads_gives_the_same_image(pictures, threads):
    command = [sys.executable, str(ROOT / "super_resolve.py"), "--precision=fp32", "--checkpoint=net", "lr.bmp"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads}, timeout=60)
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


def test_bad_input_is_one_clear_line(cli, pictures, tmp_path, monkeypatch):
    (tmp_path / "text.bmp").write_text("not an image")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "lr.bmp").read_bytes()[:500])
    (tmp_path / "lr.xyz").write_bytes((tmp_path / "lr.bmp").read_bytes())
    Image.new("RGB", (50, 50)).save("other.png")
    for folder in ("d", "empty", "done"):
        (tmp_path / folder).mkdir()
    for name in ("hr_srcnn_x3.png", "d/lr.bmp", "done/lr_srcnn_x3.bmp", "done/x.txt"):
        (tmp_path / name).write_bytes((tmp_path / "lr.bmp").read_bytes())
    os.mkfifo("pipe.png")
    os.symlink("loop.png", "loop.png")
    Path("locked").mkdir()
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: str(path) != "locked" and original(path, *how))  # root may
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    cases = [
        (1, ["missing.bmp", "--checkpoint=net"], ["missing.bmp", "no such file"]),
        (1, ["text.bmp", "--checkpoint=net"], ["text.bmp", "not an image"]),
        (1, ["cut.bmp", "--checkpoint=net"], ["cut.bmp", "not an image"]),
        (1, ["program.eps", "--checkpoint=net"], ["program.eps: not an image that can be read\n"]),
        (1, ["lr.xyz", "--checkpoint=net"], ["lr_srcnn_x3.xyz", "--output"]),
        (1, ["lr.bmp", "--checkpoint=missing"], ["missing", "no such checkpoint"]),
        (1, ["lr.bmp", "--checkpoint=text.bmp"], ["text.bmp", "damaged"]),
        (1, ["lr.bmp", "--checkpoint=net", "--ground-truth=missing.png"], ["missing.png", "no such file"]),
        (1, ["lr.bmp", "--checkpoint=net", "--ground-truth=other.png"], ["50x50", "three times 30x30"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=lr.bmp"], ["lr.bmp is an input"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=nowhere/a.bmp"], ["nowhere/a.bmp", "no such folder"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=lr.bmp/a.bmp"], ["lr.bmp/a.bmp", "no such folder"]),
        (1, ["lr.bmp", "missing.bmp", "--checkpoint=net", "--output=lr.bmp"], ["the folder lr.bmp", "File exists"]),
        (1, ["lr.bmp", "d", "--checkpoint=net", "--output=d"], ["d/lr_srcnn_x3.bmp is the output of lr.bmp, too"]),
        (1, ["lr.bmp", "hr_srcnn_x3.png", "hr.png", "--checkpoint=net"], ["hr_srcnn_x3.png is an input"]),
        (1, ["lr.bmp", "--checkpoint=net", "--ground-truth=lr.bmp"], ["no ground truth for lr.bmp"]),
        (1, ["lr.bmp", "--checkpoint=net", "--ground-truth=done"], ["done: no ground truth for lr.bmp"]),
        (1, ["d", "--checkpoint=net", "--ground-truth=d"], ["d: this folder holds no image that d holds"]),
        (1, ["lr.bmp", "hr.png", "--checkpoint=net", "--ground-truth=hr.png"], ["hr.png: one ground truth"]),
        (1, ["lr.bmp", "hr.png", "--checkpoint=net", "--ground-truth=typo"], ["typo: no such file or folder"]),
        (1, ["typo", "--checkpoint=net"], ["typo: no such file"]),
        (1, ["loop.png", "--checkpoint=net"], ["loop.png: not an image that can be read: Too many levels"]),
        (1, ["lr.bmp", "--checkpoint=net", "--output=locked/a.png"], ["cannot write locked/a.png", "no right"]),
        (2, ["", "--checkpoint=net"], ["must not be empty"]),
        (2, ["lr.bmp", "--checkpoint="], ["must not be empty"]),
        (2, ["lr.bmp", "--checkpoint=net", "--ground-truth="], ["must not be empty"]),
        (2, ["lr.bmp", "--checkpoint=net", "--output="], ["must not be empty"]),
        (1, ["empty", "--checkpoint=net"], ["empty: this folder holds no images"]),
        (1, ["done", "--checkpoint=net"], ["done: this folder holds no image but outputs"]),
        (1, ["pipe.png", "--checkpoint=net"], ["pipe.png: not a file"]),
        (1, ["lr.bmp", "--checkpoint=net", "--max-pixels=899"], ["lr.bmp", "30x30 pixels", "--max-pixels"]),
        (1, ["lr.bmp", "--checkpoint=net", "--max-pixels=449"], ["lr.bmp", "30x30 pixels", "--max-pixels"]),
        (2, ["lr.bmp", "--checkpoint=net", "--a\nb"], ["--a\\nb"]),
        (2, ["lr.bmp"], ["--checkpoint"]),
        (2, ["--checkpoint=net"], ["INPUT"]),
        (2, ["lr.bmp", "--checkpoint=net", "--scale=4"], ["--scale"]),
    ]
    if not torch.cuda.is_available():
        cases.append((1, ["lr.bmp", "--checkpoint=net", "--cuda"], ["no CUDA device"]))
    for wanted, arguments, says in cases:
        status, out, err = cli("super_resolve.py", "--precision=fp32", *arguments)
        assert (status, out) == (wanted, ""), arguments
        assert_one_line(err, *says)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files, arguments


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
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == -signal.SIGINT  # which a shell shows as 130


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_a_full_disk_leaves_nothing_half_written(cli, pictures, ending):
    """Writing stops at a size a little below that of the file."""
    command = [sys.executable, str(ROOT / "super_resolve.py"), "--checkpoint=net", "lr.bmp", f"--output=o.{ending}"]
    assert cli(*["super_resolve.py", *command[2:]])[0] == 0
    whole = Path(f"o.{ending}").read_bytes()
    limit = f"import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); \
        resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) - 100},) * 2); \
        sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    end = subprocess.run([command[0], "-c", limit, *command[1:]], capture_output=True, text=True, timeout=60)
    assert end.returncode == 1
    assert_one_line(end.stderr, f"o.{ending}", "File too large")
    assert Path(f"o.{ending}").read_bytes() == whole
    assert not list(Path().glob(".*part"))


# ------------------------------------------------------------------------ files and folders


def test_files_and_folders_mixed(cli, pictures, tmp_path):
    """A file that fails is reported at the end, the others are done; what was written before is passed over."""
    lr, _, model = pictures
    Path("in").mkdir()
    for name in ("b.png", "a.jpg", "c_srcnn_x3.png", ".hidden.png"):
        lr.save(f"in/{name}", quality=100, subsampling=0)
    Path("in/notes.txt").write_text("no image")
    Path("in/deeper.png").mkdir()
    Path("in/broken.png").write_bytes(b"\x89PNG\r\n")
    status, out, err = cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "lr.bmp", "in", "--output=o/p")
    assert status == 1
    assert len(err.splitlines()) == 2
    assert err.startswith("error: in/broken.png: not an image")
    assert err.endswith("error: 1 of 4 images failed\n")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        f"o/p/{name}" for name in ("lr_srcnn_x3.bmp", "a_srcnn_x3.jpg", "b_srcnn_x3.png")
    ]
    assert sorted(p.name for p in Path("o/p").iterdir()) == ["a_srcnn_x3.jpg", "b_srcnn_x3.png", "lr_srcnn_x3.bmp"]
    assert_same(Image.open("o/p/lr_srcnn_x3.bmp"), expected(model, lr))
    assert_same(Image.open("o/p/b_srcnn_x3.png"), expected(model, lr))
    assert_same(Image.open("o/p/a_srcnn_x3.jpg"), expected(model, Image.open("in/a.jpg")), levels=16)


def test_twice_over_a_folder_gives_the_same_files(cli, pictures, tmp_path):
    Path("in").mkdir()
    pictures[0].save("in/a.png")
    for _ in range(2):
        assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "in", "in/a.png")[0] == 0
        assert sorted(p.name for p in Path("in").iterdir()) == ["a.png", "a_srcnn_x3.png"]


@pytest.mark.parametrize("output", ["there", "new/"])
def test_one_file_into_a_folder(cli, pictures, output):
    Path("there").mkdir()
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "lr.bmp", f"--output={output}")[0] == 0
    assert [p.name for p in Path(output).iterdir()] == ["lr_srcnn_x3.bmp"]


def rows_of(out):
    """The table in what a command prints: {first column: figures}."""
    rows = (re.match(r"(\S+)(?: mean)? +(.*dB)", line) for line in out.splitlines())
    return {row[1]: [float(x) for x in re.findall(r"[-+]?[\d.]+", row[2])] for row in rows if row}


def test_ground_truths_paired_by_name(cli, pictures):
    """As the course has them, LR, bicubic and ground truth in one folder; and with the same names in another."""
    lr, hr, _ = pictures
    for folder in ("course", "lr", "hr"):
        Path(folder).mkdir()
    for name in ("a", "b"):
        lr.save(f"course/{name}_lr.bmp")
        hr.save(f"course/{name}_bicubic_x3.bmp")
        hr.save(f"course/{name}_GT.bmp")
        lr.save(f"lr/{name}.png")
    hr.save("hr/a.bmp")
    hr.transpose(Image.Transpose.ROTATE_180).save("hr/b_GT.png")
    hr.resize((9, 9)).save("hr/b.bmp")  # the one with the ending goes first
    hr.save("hr/c_GT.png")
    lr.save("lr/c_GT.png")  # named alike in both
    lr.save("lr/d.png")
    command = ("super_resolve.py", "--precision=fp32", "--checkpoint=net")
    status, out, err = cli(*command, "course", "--ground-truth=./course", "--output=o")
    assert (status, err) == (0, "")
    course = rows_of(out)
    assert [*course] == ["course/a_lr.bmp", "course/b_lr.bmp", "course"]
    assert len({*map(tuple, course.values())}) == 1
    assert len(list(Path("o").iterdir())) == 4
    Path("course/a_lr.bmp").rename("a_lr.bmp")
    lr.save("course/a_lr.bmp")
    status, out, _ = cli(*command, "a_lr.bmp", "--ground-truth=course")
    assert (status, rows_of(out)["a_lr.bmp"]) == (0, course["course/a_lr.bmp"])
    status, out, err = cli(*command, "lr/a.png", "lr", "--ground-truth=hr", "--output=o")
    assert (status, err) == (0, "")
    rows = rows_of(out)
    assert [*rows] == ["lr/a.png", "lr/b.png", "lr/c_GT.png", "hr"]
    assert rows["lr/a.png"] == rows["lr/c_GT.png"] == course["course/a_lr.bmp"]
    assert "lr: 1 images have no ground truth, passed over" in out
    assert rows["lr/b.png"][0] < rows["lr/a.png"][0] - 5
    assert rows["hr"] == pytest.approx(np.mean([*rows.values()][:3], 0), abs=1.1e-3)


def test_the_self_ensemble_is_the_mean_over_the_eight_orientations(cli, pictures):
    lr, _, model = pictures
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "lr.bmp", "--self-ensemble")[0] == 0
    pixels, outputs = np.asarray(lr).astype(np.float32), []
    for turns, flip in product(range(4), (1, -1)):
        sr = expected(model, np.rot90(pixels, turns)[:, ::flip].copy())
        outputs.append(np.rot90(sr[:, ::flip], -turns))
    assert_same(Image.open("lr_srcnn_x3.bmp"), np.mean(outputs, 0))


def test_pieces_leave_no_seam(cli, pictures, monkeypatch):
    """The image is cut where nothing is to be seen of it, in gray, colour, and with alpha."""
    lr, _, model = pictures
    for block, tile in ((7, 4), (13, 13), (29, 7)):
        monkeypatch.setattr(super_resolve, "BLOCK", block)
        options = ("--precision=fp32", "--checkpoint=net", f"--tile={tile}")
        assert cli("super_resolve.py", *options, "lr.bmp")[0] == 0
        assert_same(Image.open("lr_srcnn_x3.bmp"), expected(model, lr))
    clear = lr.convert("RGBA")
    clear.putalpha(lr.convert("L").point(lambda v: 0 if v < 110 else v))
    clear.save("clear.png")
    wholes = []
    for block in (30, 11, 6):
        monkeypatch.setattr(super_resolve, "BLOCK", block)
        options = ("--precision=fp32", "--checkpoint=net", f"--tile={block}")
        assert cli("super_resolve.py", *options, "clear.png")[0] == 0
        wholes.append(np.asarray(Image.open("clear_srcnn_x3.png")).astype(int))
    assert (wholes[0][..., 3] == 0).any()
    for other in wholes[1:]:
        visible = wholes[0][..., 3:] > 0
        assert_same(visible * other, visible * wholes[0])


def test_memory_does_not_grow_with_the_image():
    """Beyond input and output, 4 bytes a pixel of Pillow's; the features of the whole would take 2 GB."""
    code = """if True:
        import resource, sys
        from functools import partial
        import torch
        from PIL import Image
        import super_resolve
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        network = super_resolve.in_tiles(super_resolve.SRCNN(), torch.float32, 66, False)
        super_resolve.enlarge(Image.new("RGBA", (540, 540)), network)
        small = peak()
        super_resolve.enlarge(Image.new("RGBA", (1000, 900)), network)
        print(peak() - small)"""
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(end.stdout) < 10 * 4 * 1000 * 900 / 2**20 + 30


def test_it_starts_as_fast_as_torch_does():
    """Since it imports nothing that it does not need."""
    code = """if True:
        import sys, time, torch
        begin = time.perf_counter()
        import super_resolve
        print(time.perf_counter() - begin, *{"train", "tensorboard", "torchvision"} & {*sys.modules})"""
    for _ in range(3):  # of which the first does, unless the machine is busy
        seconds, *imported = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
        assert not imported
        if float(seconds) < 0.3:
            return
    pytest.fail(f"{seconds} s")


def test_transparent_images_are_measured_on_white(cli, pictures):
    lr, hr, _ = pictures
    mask = Image.new("L", (90, 90))
    mask.paste(255, (9, 9, 60, 60))
    for image, shape, name in ((lr, mask.resize((30, 30)), "lr.png"), (hr, mask, "hr.png")):
        image.putalpha(shape)
        image.save(name)
    options = ("--precision=fp32", "--checkpoint=net", "lr.png", "--ground-truth=hr.png")
    status, out, err = cli("super_resolve.py", *options)
    assert (status, err) == (0, "")
    white = [Image.new("RGBA", image.size, "white") for image in (lr, hr)]
    low, high = (Image.alpha_composite(w, image).convert("RGB") for w, image in zip(white, (lr, hr), strict=True))
    y = utils.psnr_y(data.to_tensor(data.bicubic(low, 90, 90)), data.to_tensor(high))
    assert rows_of(out)["lr.png"][0] == pytest.approx(y, abs=1e-3)


def test_one_spelling_of_a_file_is_enough(cli, pictures, tmp_path):
    status, out, _ = cli(
        "super_resolve.py", "--precision=fp32", "--checkpoint=net", "lr.bmp", "./lr.bmp", tmp_path / "lr.bmp"
    )
    assert status == 0
    assert len(out.splitlines()) == 1


def test_names_are_escaped_on_stdout(cli, pictures):
    pictures[0].save("red\x1b[31m.bmp")
    assert cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "red\x1b[31m.bmp")[1].startswith(
        "red\\x1b[31m_"
    )
