import json
import math
from pathlib import Path

import pytest
from helpers import PATH, course_content, loaded, report, trained_checkpoint, trained_content

from imaging.metrics import Quality, Scores, table
from training.inspection import course_to_json, describe, describe_course, origin, to_json
from utils import show

# Options that are missing have their defaults.
HISTORY = [(1, None), (2, {"lr": 0.001}), (4, {"num_epoch": 4}), (5, {"lr": 0.002, "num_epoch": 4})]


@pytest.fixture
def inspected():
    """Return a checkpoint with known facts, resumed four times."""
    found = trained_checkpoint()
    found.saved_at, found.torch_version = "2025-01-02 03:04:05", "2.6.0"
    found.args = {"lr": 0.003, "num_epoch": 8}
    found.training.history, found.training.train_set = HISTORY, "dead-leaves-train"
    return found


def test_describe_own_checkpoint(inspected):
    lines = """\
checkpoint.3: SRCNN 9-1-5 x3, 20,099 parameters
epoch       1 of 8
best        31.000 dB Y, after epoch 1
trained on  dead-leaves-train, in fp32
optimizer   Adam, 1 step
info        name: your name, id: 1155xxxxxx, email: example@example.com  (not filled in)
saved       2025-01-02 03:04:05, torch 2.6.0
options
  lr         0.003
  num_epoch  8
resumed     after epoch 1 of a run by another program
resumed     after epoch 2, changed: num_epoch 100 -> 4
resumed     after epoch 4, changed: lr 0.0025 -> 0.002
resumed     after epoch 5, changed: lr 0.002 -> 0.003, num_epoch 4 -> 8

""".splitlines()
    assert describe(PATH, inspected, report()) == lines + table(report())


@pytest.mark.parametrize(("init", "lines"), [("", []), ("checkpoint.pth", ["  init       checkpoint.pth"])])
def test_initial_weights_are_described_if_a_checkpoint_had_them(inspected, init, lines):
    inspected.args["init"] = init
    assert [line for line in describe(PATH, inspected, None) if line.startswith("  init")] == lines
    assert json.loads(to_json(inspected, None))["args"]["init"] == init


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (trained_content, " (epoch 1, 31.000 dB Y on photos)"),
        (course_content, " (epoch 2, 27.500 dB, on an unknown set)"),
        (lambda: {"model_state_dict": course_content()["model_state_dict"]}, ""),
    ],
    ids=["own", "course", "weights alone"],
)
def test_origin_is_described_as_far_as_it_is_known(content, wanted):
    assert origin(loaded(content())) == wanted


def test_scores_by_protocol_of_course_as_text_and_json():
    scores = Scores(Quality(math.nan, 30.0, math.nan), Quality(math.nan, 31.5, math.nan))
    assert describe_course(scores, "Set5", 8) == [
        "PSNR over RGB as the course's test measures it, on patches of Set5 in batches of 8:",
        "bicubic 30.000 dB, SRCNN 31.500 dB",
    ]
    facts = {"protocol": "course", "set": "Set5", "batch_size": 8, "bicubic_rgb": 30.0, "psnr_rgb": 31.5}
    assert json.loads(course_to_json(scores, "Set5", 8)) == facts


def test_describe_checkpoint_of_another_program():
    lines = """\
checkpoint.3: SRCNN 9-1-5 x3, 20,099 parameters
epoch       2 of 4
PSNR        27.500 dB, on an unknown set
info        name: Chan Tai Man, id: 1155000000, email: ctm@example.com
options
  lr         0.0001
  batch_size 8
  num_epoch  4
  save_freq  20""".splitlines()
    assert describe(PATH, loaded(course_content()), None) == lines


def test_json_contains_facts_of_checkpoint(inspected):
    assert json.loads(to_json(inspected, report())) == {
        "epoch": 1,
        "psnr": 31.0,
        "args": {"lr": 0.003, "num_epoch": 8},
        "info": {"name": "your name", "id": "1155xxxxxx", "email": "example@example.com"},
        "torch": "2.6.0",
        "time": "2025-01-02 03:04:05",
        "parameters": 20099,
        "scale": 3,
        "precision": "fp32",
        "best": 31.0,
        "best_epoch": 1,
        "train_set": "dead-leaves-train",
        "run": "20250102-030405-6",
        "history": [list(record) for record in HISTORY],
        "optimizer_steps": 1,
        "report": report().to_dict(),
    }


def test_json_has_null_for_infinity_and_nan(inspected):
    inspected.psnr, inspected.training.best = math.nan, math.inf
    text = to_json(inspected, report(math.inf, ssim=math.nan))
    facts = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    mean = facts["report"]["mean"]
    assert (facts["psnr"], facts["best"], mean["psnr_y"], mean["ssim_y"]) == (None, None, None, None)
    assert (mean["bicubic_y"], mean["bicubic_ssim"]) == (30.0, 0.5)


def test_control_characters_in_checkpoint_are_escaped(capsys):
    evil = "\x1b]0;owned\x07\r\n\u202e"
    saved = trained_content(info=dict.fromkeys(("name", "id", "email"), evil), train_set=evil, time=evil, torch=evil)
    saved["args"] |= {"train_data": evil, "test_data": evil}
    saved["history"] = [[1, {"train_data": "x" + evil}]]
    saved["report"] |= {"set": evil, "images": {evil: saved["report"]["images"]["a"], evil * 2: {}}}
    saved["report"]["images"][evil * 2] = saved["report"]["images"][evil]
    found = loaded(saved)
    show(*describe(Path(evil), found, found.training.report))
    text = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in text)
    assert text.count("\\x1b]0;owned\\x07\\r\\n\\u202e") == 16


def test_long_lines_are_shortened(inspected):
    inspected.args["train_data"] = "x" * 4000
    lines = describe(PATH, inspected, None)
    assert max(map(len, lines)) == 1000
    assert "  train_data x" in "\n".join(lines)
