"""One driver holds a run's lease; who lost it can commit and remove nothing."""

from __future__ import annotations

import threading
import time

import pytest

from clip_ray.errors import RunError
from clip_ray.storage import Storage
from clip_ray.training import ledger as module
from clip_ray.training.ledger import Entry, LeaseLost, Ledger, best_first, lease

pytestmark = pytest.mark.s3


def entry(step: int, recall: float | None = None, attempt: int = 1) -> Entry:
    return Entry(
        step=step,
        epoch=step // 10,
        metrics={} if recall is None else {module.BEST_METRIC: recall},
        size_bytes=1,
        folder=f"checkpoints/step-{step:08d}-{attempt:04d}",
        manifest_sha256="0",
    )


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_S", 2.0)


def quiet(line: str) -> None:
    pass


def test_commits_are_kept_by_step_and_the_later_attempt_replaces(storage: Storage) -> None:
    ledger = Ledger(storage)
    owner = ledger.take(quiet)
    attempt = ledger.begin_attempt(owner)
    for each in (entry(20), entry(10), entry(20, attempt=2)):
        ledger.commit(owner, attempt, each)
    assert [e.folder[-7:] for e in ledger.read().checkpoints] == ["10-0001", "20-0002"]
    ledger.forget(owner, attempt, {entry(10).folder})
    assert [e.step for e in ledger.read().checkpoints] == [20]


def test_a_lease_that_is_renewed_is_not_taken(storage: Storage, short_lease: None) -> None:
    ledger = Ledger(storage)
    with (
        lease(ledger, quiet, lost=lambda: None),
        pytest.raises(RunError, match=r"is being trained by .*; stop it first, or take another"),
    ):
        ledger.take(quiet)
    assert ledger.read().owner is None
    ledger.give_back(ledger.take(quiet))  # given back: no wait


def test_a_lease_left_behind_is_taken_when_it_has_run_out(
    storage: Storage, short_lease: None
) -> None:
    ledger, said = Ledger(storage), []
    dead = ledger.take(quiet)
    attempt = ledger.begin_attempt(dead)
    started_s = time.monotonic()
    ledger.take(said.append)
    assert 2 <= time.monotonic() - started_s < 6
    assert f"the lease of {dead} was not given back" in said[0]
    for late in (
        lambda: ledger.commit(dead, attempt, entry(10)),
        lambda: ledger.forget(dead, attempt, set()),
        lambda: ledger.renew(dead),
        lambda: ledger.begin_attempt(dead),
    ):
        with pytest.raises(LeaseLost, match=r"holds the lease of this run, not"):
            late()
    assert ledger.read().checkpoints == ()


def test_workers_of_an_earlier_attempt_commit_nothing(storage: Storage) -> None:
    ledger = Ledger(storage)
    owner = ledger.take(quiet)
    first = ledger.begin_attempt(owner)
    second = ledger.begin_attempt(owner)
    with pytest.raises(LeaseLost, match=rf"attempt {second} trains it now, not {first}"):
        ledger.commit(owner, first, entry(10))
    ledger.commit(owner, second, entry(10))


def test_a_driver_is_told_that_its_lease_was_taken(storage: Storage, short_lease: None) -> None:
    ledger, lost = Ledger(storage), threading.Event()
    with lease(ledger, quiet, lost.set):
        ledger._change(lambda state: state.model_copy(update={"owner": "thief"}))
        assert lost.wait(5)
    assert ledger.read().owner == "thief"


def test_commits_and_renewals_at_once_lose_nothing(storage: Storage) -> None:
    ledger = Ledger(storage)
    owner = ledger.take(quiet)
    attempt = ledger.begin_attempt(owner)
    threads = [
        threading.Thread(target=ledger.commit, args=(owner, attempt, entry(step)))
        for step in range(1, 7)
    ] + [threading.Thread(target=ledger.renew, args=(owner,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = ledger.read()
    assert [e.step for e in state.checkpoints] == [1, 2, 3, 4, 5, 6]
    assert state.renewals == 4


def test_a_pin_holds_the_newest_or_a_step(storage: Storage) -> None:
    ledger = Ledger(storage)
    owner = ledger.take(quiet)
    attempt = ledger.begin_attempt(owner)
    for step in (10, 20):
        ledger.commit(owner, attempt, entry(step))
    with ledger.pinned(None) as newest, ledger.pinned(10) as first:
        assert (newest.step, first.step) == (20, 10)
        assert {pin.folder for pin in ledger.read().pins} == {newest.folder, first.folder}
    assert ledger.read().pins == ()
    with (
        pytest.raises(RunError, match=r"has no checkpoint 30; it has \[10, 20\]"),
        ledger.pinned(30),
    ):
        pass


def test_best_first_is_of_the_validated_ones() -> None:
    entries = (entry(10, 0.5), entry(20, 0.7), entry(30), entry(40, 0.7))
    assert [e.step for e in best_first(entries)] == [40, 20, 10]
