"""Combine values of two processes, and print them in rank 0. Run with torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from upscaling.distributed import all_gather, all_reduce_mean, broadcast, process_group, rank_and_world_size

with process_group():
    rank = rank_and_world_size()[0]
    a, b = torch.tensor([1.0, 2.0]) + rank, torch.full((1, 2), 8.0 * rank)
    all_reduce_mean([a, b], (0.75, 0.25)[rank])
    values = all_gather((a.tolist(), b.tolist(), broadcast(f"from {rank}")))
    if rank == 0:
        print(values)
