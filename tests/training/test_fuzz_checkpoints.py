"""Damaged checkpoints: each is refused, or it can be used and shown. SRCNN_FUZZ=1000 tries more."""

from pathlib import Path

import torch
from fuzzing import fuzz
from helpers import trained_content, trained_file
from hypothesis import given
from hypothesis import strategies as st

from training.checkpoints import load_checkpoint
from training.inspection import describe, to_json
from utils import CommandError


def check_loading(path):
    """Check that a checkpoint is refused with a CommandError, or can be used and shown."""
    try:
        checkpoint = load_checkpoint(path)
    except CommandError:
        return
    report = checkpoint.training and checkpoint.training.report
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())
    assert describe(path, checkpoint, report)
    assert to_json(checkpoint, report)


@fuzz(200)
@given(data=st.data())
def test_flipped_bits_and_missing_ends_are_handled(data):
    content = bytearray(trained_file())
    size = len(content)
    # Most bytes are weights, but most of the damage should go to the metadata at both ends.
    places = st.integers(0, 6000) | st.integers(size - 6000, size - 1) | st.integers(0, size - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        content = content[: data.draw(places)]
    Path("x").write_bytes(content)
    check_loading(Path("x"))


TENSORS = [torch.zeros(0), torch.tensor(1.0), torch.zeros(32), torch.full((243, 243), torch.nan)]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(TENSORS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def places(content):
    """Yield all places in nested dictionaries: pairs of a dictionary and a key."""
    for key, value in content.items():
        yield content, key
        if isinstance(value, dict):
            yield from places(value)


@fuzz(100)
@given(data=st.data())
def test_values_of_any_type_are_handled(data):
    content = trained_content()
    for _ in range(data.draw(st.integers(1, 2))):
        dictionary, key = data.draw(st.sampled_from(list(places(content))))
        dictionary[key] = data.draw(VALUES)
    torch.save(content, "x")
    check_loading(Path("x"))
