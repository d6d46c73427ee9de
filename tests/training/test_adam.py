"""Our Adam is PyTorch's, without the import of torch.compile."""

import sys

import pytest
import torch
from helpers import small_run, trained_file
from processes import in_new_process
from torch import nn

from training.adam import Adam


@pytest.mark.parametrize("fused", [False, True])
def test_adam_is_that_of_pytorch(fused):
    parameters = [nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    ours, other = Adam(parameters[:1], 0.1, fused=fused), torch.optim.Adam(parameters[1:], 0.1, fused=fused)
    for step in range(3):
        for optimizer, parameter in ((ours, parameters[0]), (other, parameters[1])):
            optimizer.zero_grad()
            assert parameter.grad is None
            (parameter - step).square().sum().backward()
            optimizer.step()
    assert torch.equal(*parameters)
    assert str(ours.state_dict()) == str(other.state_dict())


def imports_torch_compile():
    small_run().optimizer.zero_grad()
    trained_file()  # takes a step, and saves a checkpoint
    return "torch._dynamo" in sys.modules


def test_training_does_not_import_torch_compile():
    assert not in_new_process(imports_torch_compile)
