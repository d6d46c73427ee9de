"""Adam, plain and in whitened coordinates of conv1, with the initial weights. The schedules are in train.py."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import SRCNN, interpolate
from training.adam import Adam
from training.grid_patches import GridPatches
from training.random_patches import RandomPatches
from training.recipe import STEP_SIZE, WHITENED_SIZE, WHITENING_FLOOR, WHITENING_PIXELS, WHITENING_SIDE
from upscaling.distributed import broadcast


def plain_adam(model: SRCNN, patches: GridPatches, generator: torch.Generator) -> "FusedAdam":
    """Set PyTorch's own initial weights, and return Adam for them."""
    for layer in (model.conv1, model.conv2, model.conv3):
        # A new layer, since the order in which values are drawn may depend on the memory format.
        new = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)  # type: ignore[arg-type]
        layer.load_state_dict(new.state_dict())
    return FusedAdam(model.parameters())


@torch.no_grad()
def whitened_adam(model: SRCNN, patches: RandomPatches, generator: torch.Generator) -> "WhitenedAdam":
    """Whiten the initial filters of conv1, and return Adam in whitened coordinates.

    The three filters that pass the image stay. The others, as drawn, respond to brightness above all, which
    switches many units of conv2 on or off for good.
    All processes use the whitening matrix of rank 0, since the signs of its rows depend on the machine.
    """
    count = math.ceil(WHITENING_PIXELS / patches.patch_size**2)
    lr = next(patches.batches(1, count, generator)).lr[..., :WHITENING_SIDE, :WHITENING_SIDE]
    whitening = broadcast(whitening_matrix(lr.cpu(), model.scale)).to(model.conv1.weight)  # (243, 243)
    filters = model.conv1.weight[3:]  # (61, 3, 9, 9)
    filters.copy_((filters.flatten(1) @ whitening).view_as(filters))
    return WhitenedAdam(model, whitening)


class FusedAdam(Adam):
    """PyTorch's fused Adam. Loading a state continues its moments, but not its hyperparameters."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, fused=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the moments of a state; there are none before the first step."""
        for i, state in state_dict["state"].items():
            parameter = self.param_groups[0]["params"][i]
            # Fused Adam works on raw memory, so the moments need the parameter's layout.
            moments = {name: torch.empty_like(parameter).copy_(state[name]) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": state["step"].to(parameter.device), **moments}


class WhitenedAdam(FusedAdam):
    """Adam in whitened coordinates of conv1: Adam's step is V, and conv1.weight changes by V P.

    The 243 values of a 9x9 RGB patch of an upscaled image are so alike that the eigenvalues of
    their covariance are orders of magnitude apart. Adam, which scales each value by itself, is
    slow there. In V it sees uncorrelated inputs of similar variance. The network stays as it is.

    All steps are ``step_size`` times Adam's, so that Adam's usual learning rates are suitable. The factor is saved
    with the state; for checkpoints that predate it, it is 1.

    Parameters
    ----------
    model : SRCNN, whose parameters are optimized
    whitening : P, Tensor of shape (243, 243), from :func:`whitening_matrix`
    """

    def __init__(self, model: SRCNN, whitening: Tensor) -> None:
        self.weight, self.whitening = model.conv1.weight, whitening.to(model.conv1.weight)
        self.v = nn.Parameter(self.whitening.new_zeros(len(self.weight), len(self.whitening)))  # (64, 243)
        self.step_size = STEP_SIZE
        super().__init__([self.v, *list(model.parameters())[1:]])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        assert self.weight.grad is not None
        self.v.grad = self.weight.grad.flatten(1) @ self.whitening.T
        self.weight.grad = None
        self.v.zero_()
        group = self.param_groups[0]
        learning_rate = group["lr"]
        group["lr"] = self.step_size * learning_rate
        super().step()
        group["lr"] = learning_rate
        self.weight += (self.v @ self.whitening).view_as(self.weight)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"whiten": self.whitening, "step_size": self.step_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.whitening = state_dict["whiten"].to(self.whitening)
        self.step_size = state_dict["step_size"]
        super().load_state_dict(state_dict)


def whitening_matrix(lr: Tensor, scale: int, floor: float = WHITENING_FLOOR, size: float = WHITENED_SIZE) -> Tensor:
    """Return the principal components of what conv1 sees, each scaled to about the same variance.

    P = ``size`` (D + ``floor``)^(-1/2) E^T, where the covariance of the patches is E D E^T. The mean of each
    channel over the 9x9 pixels is subtracted first. The rows of P have no such means either, so steps of
    conv1.weight never change its response to plain colors.

    Parameters
    ----------
    lr : uint8 Tensor of shape (N, 3, h, w), LR patches
    scale : upscaling factor
    floor : added to the variances
    size : order of magnitude of the whitened values

    Returns
    -------
    Tensor of shape (243, 243), float64
    """

    def subtract_mean(x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 81))  # (n, 3, 81)
        return (x - x.mean(2, keepdim=True)).flatten(1)  # (n, 243)

    x = F.unfold(interpolate(lr.double() / 255, scale), kernel_size=9, stride=5)  # (N, 243, patches)
    x = subtract_mean(x.transpose(1, 2).flatten(0, 1))  # (N * patches, 243)
    variances, directions = torch.linalg.eigh(x.T.cov())  # (243,), (243, 243)
    return size * subtract_mean((directions * (variances.clamp(min=0) + floor) ** -0.5).T)
