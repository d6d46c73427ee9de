"""Several processes under torchrun. Without it, there is one process and these functions do nothing.

Gradients are averaged by gloo, for GPUs too: NCCL waits for minutes when a process has died, and then ends
the others without a checkpoint. DistributedDataParallel is not used, since it works on what `forward`
computes, which folded.py bypasses, and on shares of equal size.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils import CommandError

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Rank and world size under torchrun; (0, 1) otherwise."""
    if not os.environ.keys() >= {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"}:  # other launchers set the last two
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    """The index of this process among those on its node."""
    return int(os.environ["LOCAL_RANK"]) if rank_and_world_size()[1] > 1 else 0


def node_rank() -> int:
    """The index of this process's node, which is a machine."""
    return int(os.environ["GROUP_RANK"]) if rank_and_world_size()[1] > 1 else 0


@contextlib.contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[None]:
    """Connect the processes for as long as the context lasts."""
    if rank_and_world_size()[1] == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=timeout)
    yield
    dist.destroy_process_group()  # not after an error: the other processes may be gone


@contextlib.contextmanager
def report_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CommandError("another process has ended; its own message says why") from error


def broadcast(value: T) -> T:
    """The value that rank 0 has. Raises CommandError if a process has ended."""
    values = [value]
    if rank_and_world_size()[1] > 1:
        with report_lost_process():
            dist.broadcast_object_list(values)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    values = [value] * rank_and_world_size()[1]
    if len(values) > 1:
        with report_lost_process():
            dist.all_gather_object(values, value)
    return values


def all_reduce_mean(tensors: list[Tensor], weight: float) -> None:
    """Replace tensors in place by their weighted mean over all processes.

    Parameters
    ----------
    tensors : reduced together, since each call takes about a millisecond
    weight : of this process; the weights of all processes add up to one

    Raises
    ------
    CommandError if a process has ended
    """
    if rank_and_world_size()[1] == 1:
        return
    total = torch.cat([tensor.flatten() for tensor in tensors]).mul_(weight).cpu()
    with report_lost_process():
        dist.all_reduce(total)
    means = total.to(tensors[0].device)
    for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
