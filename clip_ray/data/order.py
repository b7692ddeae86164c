"""Which samples form a global batch: a pure function of (seed, epoch, step).

An epoch is a keyed permutation of all sample ids, evaluated only where it is asked for, so that
memory does not grow with the data set and any step can be started at. It does not know the world
size: ranks take slices of the same global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """The order of `num_samples` samples in batches of `global_batch`.

    Each sample comes at most once in an epoch. The incomplete batch at an epoch's end is left
    out; what falls into it differs from epoch to epoch.
    """

    seed: int
    num_samples: int
    global_batch: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.num_samples // self.global_batch

    def sample_ids(self, step: int) -> Ids:
        """The ids of global batch `step`, counted from the start of the run: [G] int64."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.global_batch
        positions = np.arange(start, start + self.global_batch, dtype=np.uint64)
        return permute(positions, self.num_samples, key=_key(self.seed, epoch))

    def rng(self, step: int, sample_id: int) -> np.random.Generator:
        """The random state of a sample in the epoch of `step`: its caption, its crop."""
        return np.random.default_rng([self.seed, step // self.steps_per_epoch, sample_id])


def permute(positions: NDArray[np.uint64], size: int, key: int) -> Ids:
    """A keyed permutation of range(size), at `positions` only.

    A Feistel network over the next even power of two, walked until it lands below `size`
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    values = _feistel(positions, half_bits, key)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, key)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        round_key = np.uint64(_key(key, number))
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finaliser of SplitMix64 (Steele, Lea, Flood 2014); uint64 arithmetic wraps.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, number: int) -> int:
    state = np.array([(seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64], dtype=np.uint64)
    return int(_mix(state)[0])
