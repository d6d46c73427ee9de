"""Emulation of a GPU on the CPU, for tests of --cuda on machines without one.

Tensors report the device cuda:0 and, as with CUDA, cannot be mixed with CPU tensors. Their values are real.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
waits: list[str] = []  # the operations that would make the host wait for the GPU


class GpuTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        """Wrap ``inner``, a CPU tensor, in a GPU tensor that shares its memory."""
        options = {"strides": inner.stride(), "dtype": inner.dtype, "device": "cpu", "requires_grad": requires_grad}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        tensor.inner = inner
        return tensor

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = tolist = numpy

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Compute a PyTorch operation on the inner tensors."""
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            return function.decompose(*args, **kwargs)
        check_operands(str(function), args, kwargs)
        inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, GpuTensor) else x, (args, kwargs))
        result = function(*inner_args, **inner_kwargs)
        returns = function._schema.returns
        if returns and returns[0].alias_info and returns[0].alias_info.is_write:
            return args[0]  # in place
        with torch.inference_mode(False):
            return tree_map(lambda x: GpuTensor(x) if isinstance(x, torch.Tensor) else x, result)


def check_operands(name, args, kwargs):
    """Raise the errors that CUDA would raise, and record operations that make the host wait."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_cpu = [x for x in tensors if not isinstance(x, GpuTensor)]
    copied = name == "aten.copy_.default" and on_cpu
    if copied or name in ("aten._local_scalar_dense.default", "aten.nonzero.default"):
        waits.append(name)
    elif any(x.ndim or "fused" in name for x in on_cpu):  # other operations accept CPU scalars
        raise RuntimeError(f"{name}: found at least two devices, cuda:0 and cpu")
    if name == "aten._fused_adam_.default":  # the CUDA kernel checks this; the CPU kernel would mix up the values
        for group in zip(*args[:4], strict=True):  # a parameter, its gradient, and its two moments
            layouts = {tuple(step for n, step in zip(x.shape, x.inner.stride(), strict=True) if n > 1) for x in group}
            assert len(layouts) == 1, "params, grads, exp_avgs and exp_avg_sqs must have the same layout"


class Transfers(TorchFunctionMode):
    """Move tensors between CPU and GPU, and create tensors on the GPU, when the program requests it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("to", "cpu") and isinstance(args[0], torch.Tensor):
            return self.move(args[0], "cpu" if name == "cpu" else None, *args[1:], **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            assert kwargs.get("generator") is None, "a CPU generator used on the GPU"
            return GpuTensor(function(*args, **kwargs | {"device": "cpu"}))
        return function(*args, **kwargs)

    def move(self, x, *targets, device=None, dtype=None, non_blocking=False, **kwargs):
        """Emulate Tensor.to, whose targets are devices, dtypes, or tensors with the desired device and dtype."""
        new_device = x.device
        for target in (*targets, device, dtype):
            if isinstance(target, torch.Tensor):
                new_device, kwargs["dtype"] = target.device, target.dtype
            elif isinstance(target, torch.dtype):
                kwargs["dtype"] = target
            elif isinstance(target, str | torch.device):
                new_device = torch.device(target)
        from_gpu, to_gpu = isinstance(x, GpuTensor), new_device.type == "cuda"
        if from_gpu == to_gpu:
            return torch.Tensor.to(x, **kwargs) if kwargs else x
        waits.append("from the GPU" if from_gpu else "to the GPU")
        inner = (x.inner if from_gpu else x).detach()
        inner = inner.to(**kwargs, copy=True) if kwargs else inner.clone()
        return inner if from_gpu else GpuTensor(inner)


@contextlib.contextmanager
def emulated(capability=(8, 0)):
    """Emulate a machine with one GPU within this context."""
    waits.clear()
    cuda = {"device_count": 1, "set_device": None, "get_device_capability": capability}
    cuda["get_device_properties"] = mock.Mock(total_memory=2**34)
    cuda = {name: mock.Mock(return_value=value) for name, value in cuda.items()}
    with mock.patch.multiple(torch.cuda, **cuda), Transfers():
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
