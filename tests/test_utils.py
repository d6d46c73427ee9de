import argparse
import json
import math
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line, checkpoint

import data
import model as model_module
import utils
from info import Info
from model import SRCNN

BICUBIC = {  # PROTOCOL: Pillow's bicubic down and up, Y and RGB, dB
    "baby": (33.925, 32.468),
    "bird": (32.583, 30.723),
    "butterfly": (24.039, 22.764),
    "head": (32.902, 29.936),
    "woman": (28.567, 27.228),
}


def test_bicubic_has_the_known_psnr_on_set5(real_data):
    test_set = data.load_test_set(real_data / "Set5")
    report = utils.evaluate(SRCNN(), test_set)
    assert report["set"] == "Set5"
    for name, (y, rgb) in BICUBIC.items():
        assert report["images"][name]["bicubic_y"] == pytest.approx(y, abs=0.005)
        assert report["images"][name]["bicubic_rgb"] == pytest.approx(rgb, abs=0.005)
    assert report["mean"]["bicubic_y"] == pytest.approx(30.403, abs=0.005)
    assert report["mean"]["bicubic_rgb"] == pytest.approx(28.624, abs=0.005)
    assert abs(report["mean"]["psnr_y"] - 30.403) < 0.2  # untrained


def test_psnr_of_a_known_error():
    hr = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    assert utils.psnr_rgb(hr + 1, hr) == pytest.approx(20 * math.log10(255))
    # One grey level in all channels is (65.481 + 128.553 + 24.966) / 255 in Y.
    assert utils.psnr_y(hr + 1, hr) == pytest.approx(20 * math.log10(255 / (219 / 255)))
    green = hr.clone()
    green[1] += 10
    assert utils.psnr_rgb(green, hr) == pytest.approx(-10 * math.log10((10 / 255) ** 2 / 3))
    assert utils.psnr_y(green, hr) == pytest.approx(-20 * math.log10(10 / 255 * 128.553 / 255))
    assert utils.psnr_y(hr, hr) == utils.psnr_rgb(hr, hr) == math.inf


def test_psnr_rounds_to_8_bits_and_clamps(noise):
    hr = noise.clamp(10, 245)
    nearly = hr / 255 + 0.4 / 255
    assert utils.psnr_rgb(nearly, hr) == math.inf
    assert utils.psnr_rgb(hr / 255 + 0.6 / 255, hr) == pytest.approx(20 * math.log10(255))
    white = torch.full((3, 9, 9), 255, dtype=torch.uint8)
    assert utils.psnr_y(torch.full((3, 9, 9), 1.7), white) == math.inf


def test_psnr_leaves_out_the_border(noise):
    spoilt = noise.clone()
    spoilt[:, :3], spoilt[:, -3:], spoilt[:, :, :3], spoilt[:, :, -3:] = 0, 0, 0, 0
    assert utils.psnr_y(spoilt, noise) == math.inf
    assert utils.psnr_y(spoilt, noise, shave=2) < 40
    assert utils.psnr_y(spoilt, noise, shave=0) < 20


@pytest.mark.parametrize("shape", [(3, 6, 30), (1, 30, 36), (3, 30, 35)])
def test_psnr_refuses_what_it_cannot_compare(noise, shape):
    with pytest.raises(ValueError, match=r"images|nothing is left"):
        utils.psnr_y(torch.zeros(shape, dtype=torch.uint8), noise if shape[1] == 30 else torch.zeros(shape))


def test_the_mean_is_that_of_the_images_psnr():
    images = data.dead_leaves("test", 2, 60)
    sets = [
        data.TestImage(name, *(data.to_tensor(i) for i in (lr, hr, hr)), {"bicubic_y": 20.0, "bicubic_rgb": 19.0})
        for name, (lr, hr) in ((n, data.degrade(i)) for n, i in images)
    ]
    report = utils.evaluate(SRCNN(), data.TestSet("two", sets))
    rows = list(report["images"].values())
    assert len(rows) == 2
    assert report["mean"]["psnr_y"] == pytest.approx((rows[0]["psnr_y"] + rows[1]["psnr_y"]) / 2)
    assert report["mean"]["bicubic_y"] == 20
    last = utils.table(report).splitlines()[-1]
    assert last.split()[:2] == ["two", "mean"]
    assert f"{report['mean']['psnr_y']:.3f}" in last


def test_reports_as_text():
    rows = {
        "a": {"bicubic_y": 30.0, "bicubic_rgb": 28.0, "psnr_y": 31.5, "psnr_rgb": 27.75},
        "black": {key: math.inf for key in ("bicubic_y", "bicubic_rgb", "psnr_y", "psnr_rgb")},
    }
    report = {"set": "x", "images": rows, "mean": rows["a"]}
    lines = [" ".join(line.split()) for line in utils.table(report).splitlines()]
    assert lines[1] == "a 30.000 / 28.000 dB 31.500 / 27.750 dB +1.500 / -0.250 dB"
    assert lines[2] == "black inf / inf dB inf / inf dB +0.000 / +0.000 dB"
    assert utils.summary(report) == "x 31.500 dB Y (+1.500)  27.750 dB RGB (-0.250)"


# ------------------------------------------------------------------------- checkpoints


def changed(name, tensor):
    return SRCNN().state_dict() | {name: tensor}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    saved = checkpoint(args={"lr": 0.001})
    utils.save_checkpoint(tmp_path / "checkpoint.3", saved)
    loaded = utils.load_checkpoint(tmp_path / "checkpoint.3")
    assert all(torch.equal(loaded["model"][k], saved["model"][k]) for k in saved["model"])
    assert {k: loaded[k] for k in ("args", "epoch", "psnr")} == {"args": {"lr": 0.001}, "epoch": 3, "psnr": 30.5}
    assert loaded["info"] == {"name": "your name", "id": "1155xxxxxx", "email": "example@example.com"}
    assert loaded["torch"] == str(torch.__version__)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.3"]  # and no temporary file


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.best"
    path.write_bytes(b"the last good one")

    def disk_full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(utils.Failure, match=r"checkpoint\.best: No space left on device"), utils.new_file(path) as file:
        file.write(b"half of the next")
    assert path.read_bytes() == b"the last good one"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.best"]


def test_a_file_is_replaced_and_never_written_over(tmp_path):
    """Whoever holds the old file, here by a second link, keeps it whole."""
    path, link = tmp_path / "checkpoint.best", tmp_path / "link"
    path.write_bytes(b"the last good one")
    os.link(path, link)
    with utils.new_file(path) as file:
        file.write(b"the next")
    assert path.read_bytes() == b"the next"
    assert link.read_bytes() == b"the last good one"


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was-run",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (checkpoint(model=Hostile()), "nothing of it was run"),
        (checkpoint(extra=Hostile()), "nothing of it was run"),
        ([1, 2, 3], "no model"),
        (checkpoint(model=None), "no model"),
        (checkpoint(model=changed("conv1.weight", torch.zeros(64, 1, 9, 9))), r"\[64, 3, 9, 9\].*\[64, 1, 9, 9\]"),
        (checkpoint(model=changed("conv2.bias", torch.full((32,), math.nan))), "conv2.bias"),
        (checkpoint(model=changed("conv2.bias", torch.zeros(32, dtype=torch.int64))), "conv2.bias"),
        (checkpoint(model=changed("conv4.weight", torch.zeros(3))), "further layers"),
        (checkpoint(model=changed("conv2.bias", torch.zeros(32).to_sparse())), "conv2.bias"),
        (checkpoint(model=changed("conv2.bias", torch.zeros(32, device="meta"))), "conv2.bias"),
        (checkpoint(model=changed("conv2.bias", torch.zeros(32).to(torch.float8_e4m3fn))), "conv2.bias"),
        (checkpoint(epoch=-1), "negative"),
        (checkpoint(epoch="3"), "epoch"),
        (checkpoint(args=[1]), "args"),
        (checkpoint(optimizer=None), "optimizer"),
    ],
)
def test_foreign_and_hostile_checkpoints_are_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "x")
    with pytest.raises(utils.Failure, match=reason) as refusal:
        utils.load_checkpoint(tmp_path / "x")
    assert str(tmp_path / "x") in str(refusal.value)
    assert not (tmp_path / "was-run").exists()


def test_damaged_checkpoints_are_refused(tmp_path):
    utils.save_checkpoint(tmp_path / "good", checkpoint())
    good = (tmp_path / "good").read_bytes()
    files = {"cut": good[: len(good) // 2], "empty": b"", "text": b"not a checkpoint", "bare": pickle.dumps(Hostile())}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(utils.Failure, match=f"{name}: damaged"):
            utils.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "was-run").exists()
    with pytest.raises(utils.Failure, match="no such checkpoint"):
        utils.load_checkpoint(tmp_path / "missing")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(utils.MAX_CHECKPOINT_BYTES + 1)
    with pytest.raises(utils.Failure, match="large: too large"):
        utils.load_checkpoint(tmp_path / "large")
    with pytest.raises(utils.Failure, match="not a file"):
        utils.load_checkpoint(tmp_path)


def skeleton_checkpoint(path, **changes):
    """As the course's skeleton writes it: layers named by the student, epochs counted from 0."""
    weights = {f"layers.{i}": w for i, w in enumerate(SRCNN().state_dict().values())}
    opt = argparse.Namespace(mode="train", batch_size=8, num_epoch=4, save_freq=20, lr=0.0001, cuda=False)
    content = {
        "epoch": 1,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "opt": opt,
        "psnr": 27.5,
        "info": Info("Chan Tai Man", "1155000000", "ctm@example.com"),
    }
    torch.save(content | changes, path)
    return weights


def test_the_courses_checkpoints_are_read(tmp_path):
    weights = skeleton_checkpoint(tmp_path / "x")
    loaded = utils.load_checkpoint(tmp_path / "x")
    assert list(loaded["model"]) == list(SRCNN().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded["model"].values(), weights.values(), strict=True))
    assert loaded["epoch"] == 2
    assert loaded["psnr"] == 27.5
    assert loaded["args"]["batch_size"] == 8
    assert loaded["info"] == {"name": "Chan Tai Man", "id": "1155000000", "email": "ctm@example.com"}


def test_the_courses_checkpoints_get_no_more_trust(tmp_path):
    skeleton_checkpoint(tmp_path / "x", info=Hostile())
    with pytest.raises(utils.Failure, match="nothing of it was run"):
        utils.load_checkpoint(tmp_path / "x")
    assert not (tmp_path / "was-run").exists()


def test_what_a_gpu_saved_is_read_where_there_is_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # every tensor in the file says that it lay on a GPU
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        utils.save_checkpoint(tmp_path / "x", checkpoint())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "x", weights_only=True)
    loaded = utils.load_checkpoint(tmp_path / "x")
    assert all(tensor.device.type == "cpu" for tensor in loaded["model"].values())


def test_json_has_no_number_that_json_lacks(tmp_path):
    utils.save_checkpoint(tmp_path / "x", checkpoint(psnr=math.inf, best=math.nan))
    text = utils.describe(tmp_path / "x", utils.load_checkpoint(tmp_path / "x"), as_json=True)
    assert "Infinity" not in text
    assert "NaN" not in text
    facts = json.loads(text)
    assert (facts["psnr"], facts["best"], facts["epoch"]) == (None, None, 3)


def test_text_from_elsewhere_cannot_steer_the_terminal():
    assert utils.printable("a\x1b[31m\nb\u202e é") == "a\\x1b[31m\\nb\\u202e é"


def test_ctrl_c_after_the_imports_is_one_line_and_130():
    code = "import signal; signal.signal(2, signal.SIG_DFL); import utils; utils.run(lambda: signal.raise_signal(2))"
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (end.returncode, end.stdout, end.stderr) == (130, "", "interrupted\n")


def test_run_turns_failures_into_one_line(capsys):
    def fail(problem):
        def main():
            raise problem

        with pytest.raises(SystemExit) as end:
            utils.run(main)
        return end.value.code, capsys.readouterr().err

    status, err = fail(utils.Failure("no such\nthing"))
    assert status == 1
    assert_one_line(err, "error: no such\\nthing")
    status, err = fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert status == 1
    assert_one_line(err, "out of memory")
    assert fail(KeyboardInterrupt())[0] == 130
    with pytest.raises(RuntimeError, match="a bug"):  # our own mistakes keep their traceback
        fail(RuntimeError("a bug"))


# -------------------------------------------------------------------------- precision


CPU = torch.device("cpu")


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, torch.bfloat16), (1.0, torch.float32), (4.0, torch.float32)])
def test_auto_is_bf16_where_that_is_faster(monkeypatch, ratio, chosen):
    monkeypatch.setattr(model_module, "_seconds", {torch.float32: 1.0, torch.bfloat16: ratio}.get)
    trained = SRCNN()
    trained.load_state_dict(utils.load_checkpoint(ROOT / "checkpoint.pth")["model"])
    assert utils.select_dtype("auto", CPU) == chosen
    assert utils.select_dtype("auto", CPU, trained) == chosen
    assert utils.select_dtype("fp32", CPU, trained) == torch.float32
    # The same function, but the image is carried by other channels: bfloat16 would show.
    for first, second in ((trained.conv1, trained.conv2), (trained.conv2, trained.conv3)):
        first.weight.data, first.bias.data = first.weight.data.flip(0), first.bias.data.flip(0)
        second.weight.data = second.weight.data.flip(1)
    assert utils.select_dtype("auto", CPU, trained) == torch.float32
    if ratio < 1:
        assert utils.select_dtype("bf16", CPU, trained) == torch.bfloat16
    else:
        with pytest.raises(utils.Failure, match="--precision=fp32"):
            utils.select_dtype("bf16", CPU, trained)


def test_only_torchrun_makes_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert utils.processes() == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert utils.processes() == (1, 2)


def test_choosing_leaves_the_number_of_threads_as_it_was():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    utils.select_dtype("auto", CPU)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="of glibc with pages of 4 KiB",
)
def test_memory_is_kept_from_step_to_step():
    """Without keep_memory what is freed goes back to the system, and comes again with a page fault per 4 KiB."""
    code = """if True:
        import resource, sys, torch, utils
        if sys.argv[1] == "keep": utils.keep_memory()
        for turn in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [torch.ones(2**21) for _ in range(12)], torch.ones(10 * 2**20)  # 12 times 8 MB, and 40
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", code, how], text=True, cwd=ROOT, env=env))
        for how in ("keep", "-")
    }
    assert faults["keep"] < 100 < 9_000 < faults["-"]
