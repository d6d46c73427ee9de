"""Communication between processes of torchrun. With a single process these functions do nothing.

Gradients are averaged by gloo, even on GPUs: when a process dies, NCCL waits for minutes and then ends the
others without a checkpoint. DistributedDataParallel does not fit: it needs calls of `forward`, which FastSRCNN
bypasses, and it weights all processes equally, even if their shares of a batch differ.
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
    """Return the rank and the world size under torchrun, otherwise (0, 1)."""
    if not os.environ.keys() >= {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"}:  # other launchers set the last two
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    """Return the index of this process on its node, which is also the index of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if rank_and_world_size()[1] > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this node."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if rank_and_world_size()[1] > 1 else 1


def node_rank() -> int:
    """Return the index of the node, or machine, of this process."""
    return int(os.environ["GROUP_RANK"]) if rank_and_world_size()[1] > 1 else 0


@contextlib.contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[None]:
    """Connect the processes within this context."""
    if rank_and_world_size()[1] == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=timeout)
    yield
    dist.destroy_process_group()  # skipped after an error, since other processes may be gone


@contextlib.contextmanager
def report_lost_process() -> Iterator[None]:
    """Raise CommandError if communication fails."""
    try:
        yield
    except RuntimeError as error:
        raise CommandError("another process has exited; see its error message") from error


def broadcast(value: T) -> T:
    """Return the value of rank 0. Raise CommandError if a process has ended."""
    values = [value]
    if rank_and_world_size()[1] > 1:
        with report_lost_process():
            dist.broadcast_object_list(values)
    return values[0]


def all_gather(value: T) -> list[T]:
    """Return the values of all processes by rank. Raise CommandError if a process has ended."""
    values = [value] * rank_and_world_size()[1]
    if len(values) > 1:
        with report_lost_process():
            dist.all_gather_object(values, value)
    return values


def all_reduce_mean(tensors: list[Tensor], weight: float) -> None:
    """Replace tensors in place with their weighted means over all processes.

    Parameters
    ----------
    tensors : tensors to reduce in a single call, since each call takes about a millisecond
    weight : weight of this process; the weights of all processes sum to one

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
