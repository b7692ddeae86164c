"""A checkpoint exists when the ledger lists it; damage, remains and another config are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clip_ray.config import CheckpointConfig
from clip_ray.errors import RunError
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import (
    Checkpoints,
    check_identity,
    folder_of,
    list_checkpoints,
    merge_fragments,
    new_manifest,
    other_versions,
)
from clip_ray.training.ledger import BEST_METRIC, Entry, LeaseLost, Ledger, State

pytestmark = pytest.mark.s3
IDENTITY = {"seed": "0", "optim": "{}"}


class Run:
    """A run whose two ranks write a checkpoint, object by object."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.checkpoints = storage, Checkpoints(storage)
        self.owner = self.checkpoints.ledger.take(lambda line: None)
        self.attempt = self.checkpoints.ledger.begin_attempt(self.owner)

    def write(self, step: int, recall: float | None = None) -> Entry:
        folder = folder_of(step, self.attempt)
        parts = [
            self.checkpoints.write_part(folder, 1, {"param/w@2": torch.full((1,), float(step))}),
            self.checkpoints.write_part(folder, 0, {"param/w@0": torch.full((2,), float(step))}),
        ]
        log = self.checkpoints.write_file(folder, "metrics.jsonl", b'{"step": 1}\n')
        metrics = {} if recall is None else {BEST_METRIC: recall}
        manifest = new_manifest(step, step // 10, metrics, IDENTITY, [*parts, log])
        return self.checkpoints.commit(self.owner, self.attempt, folder, manifest)

    def retain(self, config: CheckpointConfig) -> None:
        self.checkpoints.retain(self.owner, self.attempt, config)

    def steps(self) -> list[int]:
        return [entry.step for entry in self.checkpoints.list()]


def test_what_the_ranks_write_is_read_whole_and_the_newest_is_last(storage: Storage) -> None:
    run = Run(storage)
    assert run.checkpoints.newest() is None
    for step in (10, 20):
        run.write(step, recall=0.5)
    newest = run.checkpoints.newest()
    assert newest is not None
    assert (newest.step, newest.epoch) == (20, 2)
    found = run.checkpoints.read(newest)
    assert torch.equal(found.tensors["param/w"], torch.full((3,), 20.0))
    assert found.log == [{"step": 1}]
    assert found.manifest.versions["torch"]


def test_a_reader_sees_no_checkpoint_before_its_last_object(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(storage)
    run.write(10)
    put, puts = Storage.write_in_parts, 0
    swap = Storage.write_if

    def looked_at(write: str, *arguments: object) -> object:
        nonlocal puts
        puts += 1
        assert [entry.step for entry in Checkpoints(storage).list()] == [10]
        done = (put if write == "in parts" else swap)(*arguments)  # type: ignore[arg-type]
        return done

    monkeypatch.setattr(Storage, "write_in_parts", lambda *a: looked_at("in parts", *a))
    monkeypatch.setattr(Storage, "write_if", lambda *a: looked_at("if", *a))
    run.write(20)
    assert puts == 5  # two parts, the log, the manifest, the ledger
    assert run.steps() == [10, 20]


@pytest.mark.parametrize("missing", ["part-00001.safetensors", "metrics.jsonl"])
def test_what_is_not_all_there_is_not_committed(storage: Storage, missing: str) -> None:
    run = Run(storage)
    entry = run.write(10)
    manifest = run.checkpoints.manifest(entry)
    storage.write_bytes(f"{entry.folder}/{missing}", b"cut")
    with pytest.raises(RunError, match=rf"{missing}: holds 3 bytes of \d+"):
        run.checkpoints.commit(run.owner, run.attempt, entry.folder, manifest)


@pytest.mark.parametrize("file", ["part-00001.safetensors", "manifest.json", "metrics.jsonl"])
def test_damage_is_an_error_that_names_the_object(storage: Storage, file: str) -> None:
    run = Run(storage)
    entry = run.write(10)
    key = f"{entry.folder}/{file}"
    storage.write_bytes(key, storage.read_bytes(key)[:-1] + b"\x7f")
    with pytest.raises(RunError, match=rf"{key}: is damaged"):
        run.checkpoints.read(entry)


def test_retention_keeps_the_last_the_best_each_so_many_and_what_is_pinned(
    storage: Storage,
) -> None:
    run = Run(storage)
    for step, recall in ((10, 0.2), (20, 0.9), (30, 0.3), (40, 0.4), (50, None)):
        run.write(step, recall)
    with run.checkpoints.ledger.pinned(10):
        run.retain(CheckpointConfig(keep_last=1, keep_best=1, keep_every=15))
        assert run.steps() == [10, 20, 30, 50]
    run.retain(CheckpointConfig(keep_last=1, keep_best=1))
    assert run.steps() == [20, 50]
    assert len(list(storage.keys("checkpoints/step-"))) == 2 * 4


def test_remains_are_listed_and_removed(storage: Storage) -> None:
    run = Run(storage)
    run.write(10, recall=0.25)
    run.checkpoints.write_part(folder_of(20, run.attempt), 0, {"param/w@0": torch.ones(3)})
    lines = list_checkpoints(storage)
    assert [(line.step, line.complete) for line in lines] == [(10, True), (20, False)]
    assert "val R@1  25.0%" in str(lines[0])
    assert str(lines[1]).endswith("incomplete")
    run.retain(CheckpointConfig())
    assert [line.step for line in list_checkpoints(storage)] == [10]


def test_who_lost_the_run_removes_nothing_of_a_later_attempt(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(storage)
    run.write(10)
    run.checkpoints.write_part(folder_of(20, run.attempt), 0, {"param/w@0": torch.ones(3)})
    forget, later = Ledger.forget, folder_of(20, run.attempt + 1)

    def overtaken(*arguments: Any) -> State:
        left = forget(*arguments)
        run.checkpoints.ledger.begin_attempt(run.owner)
        run.checkpoints.write_part(later, 0, {"param/w@0": torch.ones(3)})
        return left

    monkeypatch.setattr(Ledger, "forget", overtaken)
    run.retain(CheckpointConfig())
    assert [line.folder for line in list_checkpoints(storage)] == [folder_of(10, 1), later]
    with pytest.raises(LeaseLost):
        run.retain(CheckpointConfig())
    assert [line.folder for line in list_checkpoints(storage)] == [folder_of(10, 1), later]


def test_fragments_are_put_together_by_offset() -> None:
    whole = merge_fragments(
        [{"a@2": torch.tensor([2.0]), "b": torch.eye(2)}, {"a@0": torch.tensor([0.0, 1.0])}]
    )
    assert torch.equal(whole["a"], torch.arange(3.0))
    assert torch.equal(whole["b"], torch.eye(2))


def test_another_version_is_told(storage: Storage) -> None:
    run = Run(storage)
    manifest = run.checkpoints.manifest(run.write(10))
    assert other_versions(manifest) == []
    older = manifest.model_copy(update={"versions": manifest.versions | {"torch": "2.0"}})
    assert "was made with torch 2.0, this is" in other_versions(older)[0]


def test_another_config_is_refused_with_the_differences(storage: Storage) -> None:
    run = Run(storage)
    manifest = run.checkpoints.manifest(run.write(10))
    check_identity(manifest, IDENTITY)
    with pytest.raises(RunError, match=r"seed was 0, is 1; take another `name`"):
        check_identity(manifest, IDENTITY | {"seed": "1"})
