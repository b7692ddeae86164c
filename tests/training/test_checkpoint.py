"""A checkpoint exists when its manifest does; damage and another config are told."""

from __future__ import annotations

import pytest
import torch

from clip_ray.errors import RunError
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import BEST_METRIC, Checkpoints, check_identity

pytestmark = pytest.mark.s3
IDENTITY = {"seed": "0", "optim": "{}"}


def write(checkpoints: Checkpoints, step: int, recall: float) -> None:
    state = {"param/w": torch.full((3,), float(step))}
    checkpoints.write(step, step // 10, state, {BEST_METRIC: recall}, IDENTITY)


def test_what_is_written_is_read_and_the_newest_is_last(storage: Storage) -> None:
    checkpoints = Checkpoints(storage)
    assert checkpoints.newest() is None
    for step in (10, 20):
        write(checkpoints, step, recall=0.5)
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest.step, newest.epoch) == (20, 2)
    assert torch.equal(checkpoints.read(newest)["param/w"], torch.full((3,), 20.0))


def test_without_a_manifest_there_is_no_checkpoint(storage: Storage) -> None:
    checkpoints = Checkpoints(storage)
    write(checkpoints, 10, recall=0.5)
    storage.delete("checkpoints/step-00000010/manifest.json")
    assert checkpoints.newest() is None


def test_a_damaged_state_is_an_error_that_names_the_object(storage: Storage) -> None:
    checkpoints = Checkpoints(storage)
    write(checkpoints, 10, recall=0.5)
    key = "checkpoints/step-00000010/state.safetensors"
    storage.write_bytes(key, storage.read_bytes(key)[:-1] + b"\x7f")
    newest = checkpoints.newest()
    assert newest is not None
    with pytest.raises(RunError, match=rf"{key}: is damaged"):
        checkpoints.read(newest)


def test_prune_keeps_the_newest_and_the_best(storage: Storage) -> None:
    checkpoints = Checkpoints(storage)
    for step, recall in ((10, 0.2), (20, 0.9), (30, 0.3), (40, 0.4)):
        write(checkpoints, step, recall)
    checkpoints.prune(keep_last=1)
    assert [manifest.step for manifest in checkpoints.list()] == [20, 40]
    assert len(list(storage.keys("checkpoints/"))) == 4


def test_another_config_is_refused_with_the_differences(storage: Storage) -> None:
    checkpoints = Checkpoints(storage)
    write(checkpoints, 10, recall=0.5)
    newest = checkpoints.newest()
    assert newest is not None
    check_identity(newest, IDENTITY)
    with pytest.raises(RunError, match=r"seed was 0, is 1; take another `name`"):
        check_identity(newest, IDENTITY | {"seed": "1"})
