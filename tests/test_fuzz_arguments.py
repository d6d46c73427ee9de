"""Random command lines: each ends in a result or in one clear line. SRCNN_FUZZ=1000 tries more."""

from pathlib import Path

import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.sampled_from(
    ["1", "2", "9", "0", "-1", "3.5", "1e-3", "nan", "inf", "1e999", "x", "٣", "2147483648", "", "9" * 99]
)
PATHS = st.text(max_size=8) | st.sampled_from(
    ["lr.bmp", "hr.png", "net", ".", "", "folder", "missing", "/dev/null", "a\nb", "tiny", "new/x.png"]
)
WORDS = st.one_of(
    PATHS,
    st.sampled_from(["train", "resume", "inspect", "--", "-h", "--json", "--self-ensemble", "--num-epoch", "--lr"]),
    st.builds(
        "--{}={}".format,
        st.sampled_from(["lr", "seed", "save-freq", "hold-out", "scale", "tile", "max-pixels", "batch-size"]),
        NUMBERS,
    ),
    st.builds("--precision={}".format, st.sampled_from(["fp32", "auto", "fp64", ""])),
    st.builds("--{}={}".format, st.sampled_from(["checkpoint", "output", "ground-truth", "test-data", "from"]), PATHS),
)
TINY = ["--train-data=tiny", "--test-data=tiny", "--num-epoch=1", "--patch-size=9", "--batch-size=2"]
COMMANDS = {
    "train.py train": TINY,
    "train.py resume": [],
    "train.py inspect": [],
    "super_resolve.py": ["--checkpoint=net", "--precision=fp32"],
    "data.py": [],
}


@pytest.mark.parametrize("command", COMMANDS)
@fuzz(15)
@given(words=st.lists(WORDS, max_size=6))
def test_random_arguments_end_in_result_or_one_line(cli, pictures, monkeypatch, command, words):
    Path("tiny").mkdir(exist_ok=True)
    if not Path("tiny/a.png").exists():
        pictures[0].crop((0, 0, 12, 12)).save("tiny/a.png")
    monkeypatch.setattr("data.dead_leaves", lambda role: {"leaf": pictures[0]})
    status, _, err = cli(*command.split(), *COMMANDS[command], *words)
    assert status in (0, 1, 2)
    lines = [line for line in err.splitlines() if not line.startswith("WARNING: ")]
    if command == "super_resolve.py" and status == 1:  # it reports each image that failed
        assert lines
        assert all(line.startswith("error: ") for line in lines)
    else:
        assert len(lines) == bool(status)
    assert all(line.isprintable() for line in lines)
