"""Whatever the arguments and whatever the damage: a result, or one clear line. SRCNN_FUZZ=1000 for more examples."""

from pathlib import Path

import pytest
import torch
from helpers import MORE, trained_content, trained_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.checkpoints import load_checkpoint
from training.inspection import describe, to_json
from utils import CommandError


def fuzz(examples):
    """The same examples each time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=MORE or examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


NUMBERS = ["1", "2", "9", "0", "-1", "3.5", "1e-3", "nan", "inf", "1e999", "x", "٣", "2147483648", "", "9" * 99]
PATHS = ["lr.bmp", "hr.png", "net", ".", "", "folder", "missing", "/dev/null", "a\nb", "tiny", "new/x.png"]
NUMBERS, PATHS = st.sampled_from(NUMBERS), st.sampled_from(PATHS) | st.text(max_size=8)
OF_NUMBERS = ["lr", "seed", "save-freq", "hold-out", "tile", "max-pixels"]
OF_PATHS = ["checkpoint", "output", "ground-truth", "test-data", "from"]
WORDS = st.one_of(
    PATHS,
    st.sampled_from(["train", "resume", "inspect", "--", "-h", "--json", "--self-ensemble", "--num-epoch", "--lr"]),
    st.builds("--{}={}".format, st.sampled_from(OF_NUMBERS), NUMBERS),
    st.builds("--batch-size={}".format, NUMBERS),
    st.builds("--precision={}".format, st.sampled_from(["fp32", "auto", "fp64", ""])),
    st.builds("--{}={}".format, st.sampled_from(OF_PATHS), PATHS),
)


@pytest.mark.parametrize(
    "script", ["train.py train", "train.py resume", "train.py inspect", "super_resolve.py", "data.py"]
)
@fuzz(15)
@given(words=st.lists(WORDS, max_size=6))
def test_arguments_end_in_a_result_or_in_one_clear_line(cli, pictures, monkeypatch, script, words):
    script, *command = script.split()
    if command == ["train"]:  # something that ends soon
        command += ["--train-data=tiny", "--test-data=tiny", "--num-epoch=1", "--patch-size=9", "--batch-size=2"]
    elif script == "super_resolve.py":
        command += ["--checkpoint=net", "--precision=fp32"]
    Path("tiny").mkdir(exist_ok=True)
    if not Path("tiny/a.png").exists():
        pictures[0].crop((0, 0, 12, 12)).save("tiny/a.png")
    monkeypatch.setattr("imaging.published_sets.MIRRORS", ())
    monkeypatch.setattr("data.dead_leaves", lambda role: {"leaf": pictures[0]})
    status, _, err = cli(script, *command, *words)
    assert status in (0, 1, 2)
    lines = [line for line in err.splitlines() if not line.startswith("WARNING: ")]
    assert len(lines) == bool(status) or script == "super_resolve.py"
    assert all(line.isprintable() for line in lines)


def check_loading(path):
    """A checkpoint is refused, or it can be used and shown."""
    try:
        found = load_checkpoint(path)
    except CommandError:  # and nothing else
        return
    report = found.training and found.training.report
    assert all(tensor.isfinite().all() for tensor in found.model.values())
    assert all(line.isprintable() for line in describe(path, found, report).splitlines())
    assert to_json(found, report)


@fuzz(200)
@given(data=st.data())
def test_damaged_checkpoints_load_or_are_refused(data):
    """Bits are flipped, the end is cut off."""
    content = bytearray(trained_file())
    # Most of the bytes are weights: half of the damage is to what stands around them.
    edges = st.integers(0, 6000) | st.integers(len(content) - 6000, len(content) - 1) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(edges, min_size=1, max_size=6)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        content = content[: data.draw(edges)]
    Path("x").write_bytes(content)
    check_loading(Path("x"))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([torch.zeros(0), torch.tensor(1.0), torch.zeros(32), torch.full((243, 243), torch.nan)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def places(content):
    """All places in nested dictionaries: pairs of a dictionary and a key."""
    for key, value in content.items():
        yield content, key
        if isinstance(value, dict):
            yield from places(value)


@fuzz(100)
@given(data=st.data())
def test_checkpoints_of_anything_load_or_are_refused(data):
    """Parts are replaced by values of any type."""
    content = trained_content()
    for _ in range(data.draw(st.integers(1, 2))):
        found = list(places(content))
        dictionary, key = found[data.draw(st.integers(0, len(found) - 1))]
        dictionary[key] = data.draw(VALUES)
    torch.save(content, "x")
    check_loading(Path("x"))
