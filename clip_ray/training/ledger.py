"""Who trains a run, and which checkpoints it has: one object, changed by compare-and-swap.

Lease and list are in one object so that the lease is a fence: the write that adds a checkpoint is
also the proof that the lease is still held. A driver that lost it can add and remove nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict

from clip_ray.errors import RunError
from clip_ray.storage import Storage

LEDGER = "checkpoints/ledger.json"
BEST_METRIC = "image_retrieval_recall@1"
LEASE_S = 30.0
# A lease renewed so long ago is over, however wrong the clocks are.
CLOCK_SKEW_S = 60.0
# Who pinned a checkpoint so long ago is gone.
PIN_S = 24 * 3600.0
_RACES = 20


class LeaseLost(RunError):
    """Another driver trains this run now."""


class Entry(BaseModel):
    """A complete checkpoint: its manifest is `FOLDER/manifest.json`, with this checksum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    epoch: int
    metrics: dict[str, float]
    size_bytes: int
    folder: str
    manifest_sha256: str


class Pin(BaseModel):
    """A checkpoint that another run copies from: it is not removed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    folder: str
    since_s: float


class State(BaseModel):
    """What the ledger holds. `attempt` counts starts of the workers, `renewals` of the lease."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: str | None = None
    renewed_at_s: float = 0.0
    renewals: int = 0
    attempt: int = 0
    checkpoints: tuple[Entry, ...] = ()
    pins: tuple[Pin, ...] = ()


class Ledger:
    """The ledger of the run at `run`."""

    def __init__(self, run: Storage) -> None:
        self._run = run

    def read(self) -> State:
        """The state; an empty one where there is no ledger."""
        return self._read()[0]

    def take(self, say: Callable[[str], None]) -> str:
        """The lease, for a new owner. Raises RunError where somebody renews it.

        A lease that its holder left behind is watched until it has run out: by the taker's own
        clock, so that clocks need not agree.
        """
        owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        held = self.read()
        if held.owner is not None and time.time() - held.renewed_at_s < LEASE_S + CLOCK_SKEW_S:
            say(f"train: the lease of {held.owner} was not given back; waiting {LEASE_S:.0f} s")
            deadline_s = time.monotonic() + LEASE_S
            while time.monotonic() < deadline_s and held.owner is not None:
                time.sleep(1)
                now = self.read()
                if now.owner is not None and now.renewals != held.renewals:
                    raise RunError(
                        f"{self._run.root}: is being trained by {now.owner}; stop it first, or "
                        "take another `name`"
                    )
                held = now

        def taken(state: State) -> State:
            if (state.owner, state.renewals) not in {(held.owner, held.renewals), (owner, 0)}:
                raise LeaseLost(f"{self._run.root}: {state.owner} was faster to take it")
            return _renewed(state, owner, renewals=0)

        self._change(taken)
        return owner

    def renew(self, owner: str) -> None:
        """Says that the owner lives. Raises LeaseLost."""
        self._change_as(owner, lambda state: _renewed(state, owner, state.renewals + 1))

    def give_back(self, owner: str) -> None:
        """Ends the lease, if it is still held."""
        with contextlib.suppress(LeaseLost):
            self._change_as(owner, lambda state: state.model_copy(update={"owner": None}))

    def begin_attempt(self, owner: str) -> int:
        """Fences out the workers of earlier attempts. Called by rank 0. Raises LeaseLost."""
        return self._change_as(
            owner, lambda state: state.model_copy(update={"attempt": state.attempt + 1})
        ).attempt

    def check(self, owner: str, attempt: int) -> None:
        """Raises LeaseLost where this attempt is not the one that trains."""
        _fence(self._run, self.read(), owner, attempt)

    def commit(self, owner: str, attempt: int, entry: Entry) -> None:
        """Adds a checkpoint, in the place of one of the same step. Raises LeaseLost."""

        def added(state: State) -> State:
            others = [each for each in state.checkpoints if each.step != entry.step]
            entries = sorted([*others, entry], key=lambda each: each.step)
            return state.model_copy(update={"checkpoints": tuple(entries)})

        self._change_as(owner, added, attempt)

    def forget(self, owner: str, attempt: int, folders: set[str]) -> State:
        """Takes checkpoints out, before their objects are removed; what is left.

        Those that another run copies from stay. Raises LeaseLost.
        """

        def without(state: State) -> State:
            gone = folders - {p.folder for p in state.pins if time.time() - p.since_s < PIN_S}
            left = (each for each in state.checkpoints if each.folder not in gone)
            return state.model_copy(update={"checkpoints": tuple(left)})

        return self._change_as(owner, without, attempt)

    @contextlib.contextmanager
    def pinned(self, step: int | None) -> Iterator[Entry]:
        """A checkpoint (the newest for None) that stays while the block reads it. Needs no lease.

        Raises RunError where there is none.
        """
        token = secrets.token_hex(8)

        def with_pin(state: State) -> State:
            entries = [each for each in state.checkpoints if step in (None, each.step)]
            if not entries:
                steps = [each.step for each in state.checkpoints]
                raise RunError(f"{self._run.root}: has no checkpoint {step or ''}; it has {steps}")
            pin = Pin(token=token, folder=entries[-1].folder, since_s=time.time())
            return state.model_copy(update={"pins": (*_other(state.pins, token), pin)})

        state = self._change(with_pin)
        try:
            yield next(each for each in state.checkpoints if each.folder == state.pins[-1].folder)
        finally:
            self._change(lambda state: state.model_copy(update={"pins": _other(state.pins, token)}))

    def _change_as(
        self, owner: str, change: Callable[[State], State], attempt: int | None = None
    ) -> State:
        def fenced(state: State) -> State:
            _fence(self._run, state, owner, attempt)
            return change(state)

        return self._change(fenced)

    def _change(self, change: Callable[[State], State]) -> State:
        """Compare-and-swap: `change` may be called again, on a newer state."""
        for _ in range(_RACES):
            state, tag = self._read()
            changed = change(state)
            data = changed.model_dump_json(indent=1).encode()
            if self._run.write_if(LEDGER, data, tag):
                return changed
        raise RunError(f"{self._run.uri(LEDGER)}: changed {_RACES} times while it was written")

    def _read(self) -> tuple[State, str | None]:
        data, tag = self._run.read_tagged(LEDGER)
        return (State() if data is None else State.model_validate_json(data)), tag


@contextlib.contextmanager
def lease(ledger: Ledger, say: Callable[[str], None], lost: Callable[[], None]) -> Iterator[str]:
    """Holds the lease of a run during the block; `lost` is called where somebody else took it."""
    owner, ended = ledger.take(say), threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_S / 3):
            try:
                ledger.renew(owner)
            except LeaseLost as error:
                say(f"train: {error}")
                return lost()
            except RunError as error:  # the store is away: the lease may run out meanwhile
                say(f"train: the lease could not be renewed: {error}")

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        ended.set()
        thread.join(timeout=LEASE_S)
        with contextlib.suppress(RunError):
            ledger.give_back(owner)


def best_first(entries: tuple[Entry, ...]) -> list[Entry]:
    """The validated ones by BEST_METRIC, the later of equals first."""
    validated = [entry for entry in entries if BEST_METRIC in entry.metrics]
    return sorted(validated, key=lambda each: (-each.metrics[BEST_METRIC], -each.step))


def _fence(run: Storage, state: State, owner: str, attempt: int | None) -> None:
    if state.owner != owner:
        raise LeaseLost(
            f"{run.root}: {state.owner or 'nobody'} holds the lease of this run, not {owner}; this "
            "driver stops"
        )
    if attempt is not None and state.attempt != attempt:
        raise LeaseLost(f"{run.root}: attempt {state.attempt} trains it now, not {attempt}")


def _other(pins: tuple[Pin, ...], token: str) -> tuple[Pin, ...]:
    return tuple(pin for pin in pins if pin.token != token)


def _renewed(state: State, owner: str, renewals: int) -> State:
    return state.model_copy(
        update={"owner": owner, "renewals": renewals, "renewed_at_s": time.time()}
    )
