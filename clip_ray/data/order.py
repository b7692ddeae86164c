"""Which samples form a global batch: a pure function of (seed, epoch, step).

An epoch shuffles blocks of neighbouring samples, then the samples of each window of blocks: a
window is what readers hold at a time, so that storage is read in blocks, each of them once. Both
shuffles are keyed permutations, evaluated for one window at a time: memory does not grow with the
data set, and any step can be started at. The order does not know the world size: ranks take
slices of the same global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Positions = NDArray[np.uint64]
_ROUNDS = 6
# What a batch has in common with the next, and its parts with each other, is kept. That keeps an
# order, too, which is small.
CACHED = 4


@dataclass(frozen=True)
class Order:
    """The order of `num_samples` samples in batches of `global_batch`.

    Each sample comes at most once in an epoch. The incomplete batch at an epoch's end is left
    out; what falls into it differs from epoch to epoch. Two samples of one block share a batch
    with probability (G - 1) / (window - 1), others in 1 / (number of windows) of the epochs that.
    """

    seed: int
    num_samples: int
    global_batch: int
    block_rows: int = 16
    window_blocks: int = 128

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.num_samples // self.global_batch

    @lru_cache(maxsize=CACHED)  # noqa: B019
    def sample_ids(self, step: int) -> Ids:
        """The ids of global batch `step`, from the start of the run: [G] int64, read-only."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.global_batch
        stop, parts = start + self.global_batch, list[Ids]()
        while start < stop:
            number, first = self._window_of(start, epoch)
            parts.append(self._window(number, epoch)[start - first : stop - first])
            start += len(parts[-1])
        return _read_only(np.concatenate(parts))

    def rng(self, step: int, sample_id: int) -> np.random.Generator:
        """The random state of a sample in the epoch of `step`: its caption, its crop."""
        return np.random.default_rng([self.seed, step // self.steps_per_epoch, sample_id])

    def blocks_ahead(self, step: int) -> Ids:
        """The blocks that come into use one window after `step`: each once, step after step."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        bounds = np.array([step_of_epoch, step_of_epoch + 1]) * self.global_batch
        first, last = (bounds // self.block_rows + self.window_blocks).tolist()
        slots = np.arange(first, last)
        here, later = slots[slots < self._blocks], slots[slots >= self._blocks] - self._blocks
        later = later[later < self._blocks]
        return np.concatenate([self._blocks_at(here, epoch), self._blocks_at(later, epoch + 1)])

    @property
    def _blocks(self) -> int:
        return -(-self.num_samples // self.block_rows)

    def _blocks_at(self, slots: Ids, epoch: int) -> Ids:
        return permute(slots.astype(np.uint64), self._blocks, _key(self.seed, epoch))

    def _window_of(self, position: int, epoch: int) -> tuple[int, int]:
        """The window of a position of an epoch, and the window's first position.

        The last block may be short. In the window that it falls into it counts as the last, and
        the positions of all windows after that one are shifted by what it lacks.
        """
        short_window = self._short_slot(epoch) // self.window_blocks
        past_short = position >= self._window_end(short_window) - self._lacking
        shift = self._lacking if past_short else 0
        window_rows = self.window_blocks * self.block_rows
        number = (position + shift) // window_rows
        return number, number * window_rows - shift

    @lru_cache(maxsize=CACHED)  # noqa: B019
    def _window(self, number: int, epoch: int) -> Ids:
        """All ids of a window of an epoch."""
        key, rows, short_slot = _key(self.seed, epoch), self.block_rows, self._short_slot(epoch)
        is_short = number == short_slot // self.window_blocks
        first_slot, end = number * self.window_blocks, self._window_end(number)
        size = end - first_slot * rows - (self._lacking if is_short else 0)
        shuffled = permute(np.arange(size, dtype=np.uint64), size, _key(key, number + 1))
        slots, offsets = np.divmod(shuffled, rows)
        slots += first_slot
        if is_short:
            last = end // rows - 1
            slots = np.where(slots == last, short_slot, np.where(slots == short_slot, last, slots))
        return _read_only(self._blocks_at(slots, epoch) * rows + offsets)

    @property
    def _lacking(self) -> int:
        """Rows that the last block lacks."""
        return self._blocks * self.block_rows - self.num_samples

    @lru_cache(maxsize=CACHED)  # noqa: B019
    def _short_slot(self, epoch: int) -> int:
        """Where an epoch has the last block."""
        return unpermute(self._blocks - 1, self._blocks, _key(self.seed, epoch))

    def _window_end(self, window: int) -> int:
        """The row after a window, as if every block were full."""
        return min((window + 1) * self.window_blocks, self._blocks) * self.block_rows


def _read_only(ids: Ids) -> Ids:
    ids.flags.writeable = False
    return ids


def permute(positions: Positions, size: int, key: int) -> Ids:
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


def unpermute(value: int, size: int, key: int) -> int:
    """The position at which `permute` has `value`."""
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    values = _feistel(np.array([value], dtype=np.uint64), half_bits, key, inverse=True)
    while values[0] >= size:
        values = _feistel(values, half_bits, key, inverse=True)
    return int(values[0])


def _feistel(values: Positions, half_bits: int, key: int, inverse: bool = False) -> Positions:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    if inverse:  # the same rounds, last to first, the halves exchanged before and after
        left, right = right, left
    for number in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        round_key = np.uint64(_key(key, number))
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    if inverse:
        left, right = right, left
    return (left << shift) | right


def _mix(values: Positions) -> Positions:
    # The finaliser of SplitMix64 (Steele, Lea, Flood 2014); uint64 arithmetic wraps.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1024)
def _key(seed: int, number: int) -> int:
    state = np.array([(seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64], dtype=np.uint64)
    return int(_mix(state)[0])
