"""Which rank lets the others wait: the seconds each spends by itself, out of collectives."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

# A rank this many times slower than the median one is named.
SLOW = 1.25
SHOWN = 16


def straggler(own_s: Sequence[float], nodes: Sequence[str]) -> str | None:
    """A line that names the slowest rank and its node; None where it is not much slower.

    `own_s`: seconds of a step by rank, without those in collectives; `nodes` by rank.
    """
    slowest = max(range(len(own_s)), key=own_s.__getitem__)
    usual_s = median(own_s)
    if own_s[slowest] < SLOW * usual_s:
        return None
    first = sorted(range(len(own_s)), key=own_s.__getitem__, reverse=True)[:SHOWN]
    by_rank = ", ".join(f"{rank}: {own_s[rank]:.3f}" for rank in first)
    return (
        f"train: the others wait for rank {slowest} on {nodes[slowest]}: "
        f"{own_s[slowest]:.3f} s a step by itself, the median {usual_s:.3f} (by rank, {by_rank})"
    )
