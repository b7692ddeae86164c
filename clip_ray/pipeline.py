"""The steps of the way, each in the session it needs: what the CLI and the jobs run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from clip_ray.config import Config
from clip_ray.data.prepare import is_prepared, prepare
from clip_ray.embedded_s3 import storage_session
from clip_ray.storage import Storage
from clip_ray.training.launch import ray_session, train

Say = Callable[[str], None]


@contextlib.contextmanager
def session(config: Config, say: Say) -> Iterator[None]:
    """Storage reachable and Ray running while the block does. Raises RunError."""
    with storage_session(config.storage), ray_session(config):
        say(f"storage: {config.storage.root}")
        yield


def prepare_data(config: Config, say: Say) -> None:
    """Prepares the data set, or says that it is there."""
    storage = Storage(config.data_root)
    if is_prepared(config.data, storage):
        say(f"prepare: {storage.root} is there already")
        return
    manifest = prepare(config.data, storage, say)
    counts = ", ".join(f"{manifest.rows(split)} {split}" for split in manifest.splits)
    say(f"prepare: {counts}; {len(manifest.rejected)} rejected, {len(manifest.left_out)} left out")


def train_model(config: Config, say: Say) -> None:
    """Trains the run to its end."""
    if train(config, say):
        say(f"train: done; weights in {config.run_root}/weights")
