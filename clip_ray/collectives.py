"""Collectives of the loss and of the validation, over torch.distributed's default group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes in the group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place in the group; 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


class _AllGather(torch.autograd.Function):
    """Forward: all-gather. Backward: the sum over ranks of the gradient of this rank's part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # gloo has no reduce-scatter for all types: reduce everything, keep our part.
        gathered = grads[0].contiguous()
        dist.all_reduce(gathered)
        return gathered.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather_with_grad(local: Tensor) -> Tensor:
    """[B, D] of each rank to [G, D], ordered by rank; differentiable.

    Every rank must call it, with the same B. The gradient of a rank's part sums what all ranks'
    losses ask of it, so that with a mean over ranks of the parameters' gradients the result is
    that of one process on the whole batch.
    """
    if world_size() == 1:
        return local
    gathered = _AllGather.apply(local)
    assert isinstance(gathered, Tensor)
    return gathered


def gather_rows(local: Tensor) -> Tensor:
    """Rows [n_r, D] of each rank, n_r of any size, as one [sum n_r, D]. Every rank must call it."""
    if world_size() == 1:
        return local
    counts = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    longest = max(int(count) for count in counts)
    padded = torch.zeros(longest, *local.shape[1:], dtype=local.dtype, device=local.device)
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a scalar over the ranks. Every rank must call it."""
    value = value.detach().double().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return float(value) / world_size()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Every rank must call it."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        dist.barrier()
