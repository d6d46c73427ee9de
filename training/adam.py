"""PyTorch's Adam without its decorators for torch.compile.

Their first call would import torch.compile, which takes more than a second: as long as `import torch`.
"""

import inspect

import torch


class Adam(torch.optim.Adam):
    """PyTorch's Adam without its option ``differentiable``."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
