"""The tensors in a checkpoint may lie in memory in any way; loaded, each has memory of its own."""

from pathlib import Path

import pytest
import torch
from helpers import same, trained_content

from checkpoints import load_checkpoint

NUMBERS = 1 + torch.rand(60_000, generator=torch.Generator().manual_seed(0))  # greater than 1, as steps must be
LAYOUTS = {
    "expanded": lambda t: NUMBERS[0].clone().expand(t.shape),
    "expanded along rows": lambda t: NUMBERS[: t.shape[-1]].clone().expand(t.shape) if t.ndim else t,
    "transposed": lambda t: t.permute(tuple(range(t.ndim))[::-1]).contiguous().permute(tuple(range(t.ndim))[::-1]),
    "overlapping": lambda t: NUMBERS.clone().as_strided(t.shape, (1,) * t.ndim),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 1],
    "of shared memory": lambda t: NUMBERS[: t.numel()].view(t.shape),
    "of shared memory at other places": lambda t: NUMBERS[t.ndim : t.ndim + t.numel()].view(t.shape),
    "that require gradients": lambda t: t.clone().requires_grad_(),
    "that are parameters": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    "that are to be negated": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_any_layout_become_contiguous_copies(layout):
    """Fused Adam works on raw memory: with other strides it would write the wrong places, or one many times."""
    change, saved = LAYOUTS[layout], trained_content()
    saved["model"] = {name: change(tensor) for name, tensor in saved["model"].items()}
    states = saved["optimizer"]["state"]
    states |= {i: {name: change(tensor) for name, tensor in state.items()} for i, state in states.items()}
    saved["optimizer"]["whiten"] = change(saved["optimizer"]["whiten"])
    torch.save(saved, "x")
    found = load_checkpoint(Path("x"))
    optimizer = found.training.optimizer
    assert same(found.model, saved["model"])
    assert all(same(optimizer["state"][i], states[i]) for i in range(6))
    assert torch.equal(optimizer["whiten"], saved["optimizer"]["whiten"])
    tensors = [*found.model.values(), optimizer["whiten"]]
    tensors += [tensor for state in optimizer["state"].values() for tensor in state.values()]
    for tensor in tensors:
        assert type(tensor) is torch.Tensor
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
        assert not tensor.is_neg()
        assert not tensor.requires_grad
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 6 + 1 + 6 * 3


def test_a_random_state_of_any_layout_becomes_a_contiguous_copy():
    state = torch.Generator().manual_seed(1).get_state()
    torch.save(trained_content(random_state=torch.stack([state, state], -1)[:, 1]), "x")
    found = load_checkpoint(Path("x")).training.random_state
    assert torch.equal(found, state)
    assert found.is_contiguous()
