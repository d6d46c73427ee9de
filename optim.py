"""Adam, plain and with orthogonal updates in whitened coordinates, and the learning-rate schedule."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import SRCNN, bicubic_x3


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam, whose hyperparameters are not those of the state that it loads."""

    def __init__(self, parameters: Iterable[nn.Parameter], beta1: float = 0.9) -> None:
        super().__init__(parameters, betas=(beta1, 0.999), fused=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        self.param_groups[0]["lr"] = learning_rate

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the moments of a state; there are none before the first step."""
        for i, state in state_dict["state"].items():
            parameter = self.param_groups[0]["params"][i]
            # Fused Adam works on raw memory, so the moments need the parameter's layout.
            moments = {name: torch.empty_like(parameter).copy_(state[name]) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": state["step"].to(parameter.device), **moments}


class OrthogonalAdam(Adam):
    """Adam with orthogonal updates of the three weights, and in whitened coordinates of conv1.

    The 243 values of a 9x9 RGB patch of an upscaled image are so alike that the eigenvalues of
    their covariance are orders of magnitude apart. Adam, which scales each value by itself, is
    slow there. So conv1 moves by V P, where P takes a patch to uncorrelated values of similar
    variance, and Adam sees V.

    The updates that Adam finds for a weight are dominated by few directions. Each is replaced by
    the nearest matrix with orthogonal rows, as in Muon (Jordan et al., 2024), so all directions
    are learned at one speed.

    Parameters
    ----------
    model : SRCNN, whose parameters are optimized
    whitening : P, Tensor of shape (243, 243), from :func:`whitening_matrix`
    """

    sizes = (1.3, 1.75, 0.16)  # root mean square of an update of conv1 (of V), conv2 and conv3, in learning rates

    def __init__(self, model: SRCNN, whitening: Tensor) -> None:
        self.layers = model.conv1, model.conv2, model.conv3
        self.whitening = whitening.to(model.conv1.weight)
        updates = self.whitening.new_zeros(64, 243), *(torch.zeros_like(layer.weight) for layer in self.layers[1:])
        self.updates = [nn.Parameter(update) for update in updates]
        parameters = [p for update, layer in zip(self.updates, self.layers, strict=True) for p in (update, layer.bias)]
        super().__init__(parameters, beta1=0.8)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for update, layer in zip(self.updates, self.layers, strict=True):
            gradient, layer.weight.grad = layer.weight.grad, None
            assert gradient is not None
            update.grad = gradient if layer is not self.layers[0] else gradient.flatten(1) @ self.whitening.T
            update.zero_()
        super().step()
        (conv1, conv2, conv3), (update1, update2, update3) = self.layers, self.updates
        size1, size2, size3 = (size * self.param_groups[0]["lr"] for size in self.sizes)
        conv1.weight += (size1 * orthogonal(update1) @ self.whitening).view_as(conv1.weight)
        conv2.weight += size2 * orthogonal(update2.flatten(1)).view_as(conv2.weight)
        by_feature = update3.transpose(0, 1)  # (32, 3, 5, 5)
        conv3.weight += size3 * orthogonal(by_feature.flatten(1)).view(by_feature.shape).transpose(0, 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"whiten": self.whitening}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.whitening = state_dict["whiten"].to(self.whitening)
        super().load_state_dict(state_dict)


def orthogonal(x: Tensor) -> Tensor:
    """Nearly the nearest matrix with orthogonal rows, all of one length; the mean of its squares is 1.

    Five steps of a Newton-Schulz iteration, with Muon's coefficients, bring all singular values near to each other.

    Parameters
    ----------
    x : Tensor of shape (rows, columns), rows <= columns
    """
    scale = x.shape[1] ** 0.5
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return scale * x


def whitening_matrix(lr: Tensor, floor: float = 1e-3, size: float = 0.3) -> Tensor:
    """The principal components of what conv1 sees, each scaled to about the same variance.

    P = ``size`` (D + ``floor``)^(-1/2) E^T, where the covariance of the patches is E D E^T. The mean of each
    channel over the 9x9 pixels is subtracted first. P has no such means either, so what conv1 makes of
    plain colours never changes.

    Parameters
    ----------
    lr : uint8 Tensor of shape (N, 3, h, w), LR patches
    floor : keeps noise from being amplified
    size : order of magnitude of conv1's features

    Returns
    -------
    Tensor of shape (243, 243), float64
    """

    def subtract_mean(x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 81))
        return (x - x.mean(2, keepdim=True)).flatten(1)

    x = F.unfold(bicubic_x3(lr.double() / 255), kernel_size=9, stride=5)  # (N, 243, patches)
    x = subtract_mean(x.transpose(1, 2).flatten(0, 1))  # (N * patches, 243)
    variances, directions = torch.linalg.eigh(x.T.cov())
    return size * subtract_mean((directions * (variances.clamp(min=0) + floor) ** -0.5).T)


@torch.no_grad()
def whiten_filters(model: SRCNN, whitening: Tensor) -> None:
    """Whiten the initial random filters of conv1, all except for the three that pass the image.

    As drawn they respond to brightness above all, which switches many units of conv2 on or off for good.
    """
    filters = model.conv1.weight[3:]
    filters.copy_((filters.flatten(1) @ whitening.to(filters)).view_as(filters))


def linear_schedule(peak: float, step: float, total: int) -> float:
    """The learning rate at a step: linear warm-up, then a linear decay that ends at zero.

    The warm-up takes 5% of all steps, but at least 100: Adam's first steps are of full size
    whatever the gradient, and would leave a very short training worse than it began.
    """
    return peak * min(1.0, step / max(0.05 * total, 100)) * (1 - step / total)
