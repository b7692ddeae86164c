"""Collectives of the loss and of the validation, over torch.distributed's default group."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

MEASURED_BYTES, MEASURED_ROUNDS = 16 * 2**20, 6


def use_interface_of(address: str) -> None:
    """Lets gloo and NCCL take the network interface that has this address.

    By themselves gloo takes the one that the host's name stands for, and NCCL the first that it
    finds. What the environment names stays; call it before the process group is made.
    """
    for interface, found in psutil.net_if_addrs().items():
        if any(each.address == address for each in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def world_size() -> int:
    """Processes in the group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place in the group; 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


def backend() -> str:
    """What carries the collectives: nccl, gloo, …"""
    return dist.get_backend() if dist.is_initialized() else "no process group"


class _AllGather(torch.autograd.Function):
    """Forward: all-gather. Backward: the sum over ranks of the gradient of this rank's part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return all_gather(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return reduce_scatter(grads[0])


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


def all_gather(local: Tensor) -> Tensor:
    """Rows [B, …] of each rank to [W·B, …], by rank. Every rank must call it, with the same B."""
    if world_size() == 1:
        return local
    gathered = local.new_empty(world_size() * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered


def reduce_scatter(tensor: Tensor, part: Tensor | None = None) -> Tensor:
    """The sum over ranks of this rank's part of [W·B, …]: [B, …], into `part` where it is given.

    Every rank must call it.
    """
    if world_size() == 1:
        return tensor
    if part is None:
        part = tensor.new_empty(len(tensor) // world_size(), *tensor.shape[1:])
    dist.reduce_scatter_tensor(part, tensor.contiguous())
    return part


def all_reduce_logsumexp(logarithms: Tensor) -> Tensor:
    """log of the sum over ranks of e^x, for each element. Every rank must call it."""
    if world_size() == 1:
        return logarithms
    largest = logarithms.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    finite = largest.clamp_min(torch.finfo(largest.dtype).min)
    total = (logarithms - finite).exp_()
    dist.all_reduce(total)
    return total.log_().add_(finite)


class _MeanOverRanks(torch.autograd.Function):
    """A sum of the ranks' means over rows; its gradient reaches every rank."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def mean_over_ranks_with_grad(rows: Tensor) -> Tensor:
    """The mean [D] of the rows [B, D] of all ranks; differentiable as `all_gather_with_grad`."""
    mean = rows.mean(0)
    if world_size() == 1:
        return mean
    total = _MeanOverRanks.apply(mean)
    assert isinstance(total, Tensor)
    return total / world_size()


class Shift:
    """Tensors on their way to the next rank, while those of the rank before arrive."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._arriving = [torch.empty_like(tensor) for tensor in tensors]
        self._sent = [tensor.contiguous() for tensor in tensors]  # kept until they have gone
        self._works: list[Any] = []
        if world_size() == 1:
            self._arriving = self._sent
            return
        following, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
        sends = [dist.P2POp(dist.isend, tensor, following) for tensor in self._sent]
        receives = [dist.P2POp(dist.irecv, tensor, before) for tensor in self._arriving]
        self._works = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> list[Tensor]:
        """What has arrived."""
        for work in self._works:
            work.wait()
        return self._arriving


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


def max_over_ranks(values: Sequence[int]) -> list[int]:
    """The largest of the ranks' values, each by itself. Every rank must call it."""
    device = "cuda" if backend() == "nccl" else "cpu"
    largest = torch.tensor([int(value) for value in values], device=device)
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def votes_of_ranks(flag: Tensor, votes: Sequence[int]) -> tuple[bool, list[int]]:
    """Whether a bool is true on some rank, and the largest of the ranks' votes, each by itself.

    One reduction for both. Every rank must call it, with as many votes.
    """
    largest = torch.tensor([0, *votes], device=flag.device)
    largest[0] = flag
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    is_true, *voted = largest.tolist()
    return bool(is_true), voted


def all_gather_objects(value: Any) -> list[Any]:
    """Each rank's `value`, by rank. Every rank must call it."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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


def all_reduce_bytes_per_s(
    kind: str, host: str, port: int, rank: int, world_size: int, timeout_s: float, address: str
) -> float:
    """The bus bandwidth of a few all-reduces in a group of their own: what each link carried.

    Every rank must call it, with the host of rank 0 and a free port there, and its own node's
    `address`; `kind` is the backend.
    """
    use_interface_of(address)
    device = torch.device("cuda" if kind == "nccl" else "cpu")
    dist.init_process_group(
        kind,
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        values = torch.ones(MEASURED_BYTES // 4, device=device)
        times_s = []
        for _ in range(MEASURED_ROUNDS):
            started_s = time.perf_counter()
            dist.all_reduce(values, dist.ReduceOp.MAX)
            float(values[0])  # waits for the device
            times_s.append(time.perf_counter() - started_s)
    finally:
        dist.destroy_process_group()
    # The first one opens the connections.
    sent_bytes = 2 * (world_size - 1) / world_size * MEASURED_BYTES
    return sent_bytes / statistics.median(times_s[1:])
