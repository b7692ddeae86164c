"""Two ways for a rank to see every rank's block: all at once, or one after the other in a ring.

`visit(block, result, work, merge)` calls `work(blocks, results)` until it has seen the blocks of
all ranks; `work` adds to results in place. What all ranks added to this rank's results is merged
and returned. Every rank must call it, with blocks of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from clip_ray.collectives import (
    Shift,
    all_gather,
    all_reduce_logsumexp,
    rank,
    reduce_scatter,
    world_size,
)

Merge = Literal["sum", "logsumexp"]
Work = Callable[[list[Tensor], Tensor], None]


class Route(Protocol):
    """How blocks travel."""

    def visit(self, block: list[Tensor], result: Tensor, work: Work, merge: Merge) -> Tensor:
        """`result`: what nothing sums to; the merged one is returned. See the module."""
        ...


class AllGather:
    """Every rank holds all blocks: G×D for features, once more for their gradient."""

    def visit(self, block: list[Tensor], result: Tensor, work: Work, merge: Merge) -> Tensor:
        """See the module."""
        results = result.repeat(world_size(), *[1] * (result.ndim - 1))
        work([all_gather(tensor) for tensor in block], results)
        if merge == "sum":
            return reduce_scatter(results, result)
        return all_reduce_logsumexp(results).chunk(world_size())[rank()].clone()


class Ring:
    """No rank holds more than two blocks; the next one arrives while this one is worked on."""

    def visit(self, block: list[Tensor], result: Tensor, work: Work, merge: Merge) -> Tensor:
        """See the module."""
        add = torch.logaddexp if merge == "logsumexp" else torch.add
        arriving = None
        for hop in range(world_size()):
            last = hop == world_size() - 1
            next_block = None if last else Shift(block)
            mine = result.clone()
            work(block, mine)
            if arriving is not None:
                mine = add(mine, arriving.wait()[0])
            arriving = Shift([mine])
            if next_block is not None:
                block = next_block.wait()
        assert arriving is not None
        return arriving.wait()[0]
