"""The steps of the way, each in the session it needs: what the CLI and the jobs run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from clip_ray.config import Config
from clip_ray.data.prepare import is_prepared, prepare, requeue
from clip_ray.data.shards import Quarantined, read_quarantine
from clip_ray.embedded_s3 import embedded_folder, storage_session
from clip_ray.errors import RunError
from clip_ray.evaluation.evaluate import evaluate
from clip_ray.model.clip import hollow_model
from clip_ray.model.groups import learning_rate_factors
from clip_ray.model.pretrained import load_model
from clip_ray.search.index import Hit, read_index
from clip_ray.storage import Storage
from clip_ray.training.launch import train
from clip_ray.training.run_log import check_run_logs
from clip_ray.training.session import ray_session

if TYPE_CHECKING:
    from clip_ray.tuning.journal import Journal, Sweep, Trial
    from clip_ray.tuning.space import Space

Say = Callable[[str], None]


@contextlib.contextmanager
def session(config: Config, say: Say, dashboard: bool = False) -> Iterator[None]:
    """Storage reachable and Ray running while the block does. Raises RunError."""
    with storage_session(config.storage), ray_session(config, dashboard):
        say(f"storage: {config.storage.root}")
        yield


def check(config: Config) -> None:
    """What can be known without a cluster: model and logs can be had, and storage answers.

    Raises ConfigError or RunError.
    """
    learning_rate_factors(hollow_model(config.model), config.optim)
    check_run_logs(config.logging)
    if embedded_folder(config.storage) is None:
        Storage(config.storage.root).check_bucket()


def prepare_data(config: Config, say: Say) -> None:
    """Prepares the data set, or says that it is there."""
    storage = Storage(config.data_root)
    if is_prepared(config.data, storage):
        say(f"prepare: {storage.root} is there already")
        return
    manifest = prepare(config.data, storage, say)
    counts = ", ".join(f"{manifest.rows(split)} {split}" for split in manifest.splits)
    say(
        f"prepare: {counts}; {manifest.quarantined} quarantined, {len(manifest.left_out)} without "
        f"a split left out (layout {manifest.layout})"
    )


def quarantine(config: Config) -> list[Quarantined]:
    """What the prepared data set could not use."""
    return read_quarantine(Storage(config.data_root))


def requeue_data(config: Config, say: Say) -> None:
    """Tries the quarantine again, after a repair of the source."""
    before = len(quarantine(config))
    manifest = requeue(config.data, Storage(config.data_root), say)
    say(f"quarantine: {before} before, {manifest.quarantined} now")


def train_model(config: Config, say: Say) -> None:
    """Trains the run to its end."""
    if train(config, say):
        say(f"train: done; weights in {config.run_root}/weights")


def evaluate_model(config: Config, say: Say) -> dict[str, dict[str, float]]:
    """Metrics by task, printed as a table too."""
    results = evaluate(config)
    for task, metrics in results.items():
        for name, value in metrics.items():
            say(f"evaluate: {task}: {name:28} {value:7.2%}")
    say(f"evaluate: results in {config.run_root}/results")
    return results


def tune_model(
    journal: Journal, sweep: Sweep, config: Config, space: Space, say: Say
) -> list[Trial]:
    """Runs what is left of a sweep and says which trials were the best, the best first."""
    from clip_ray.tuning.screen import lines  # needs the extra [tune]
    from clip_ray.tuning.sweep import run_sweep

    found = run_sweep(journal, sweep, config, space, say)
    for line in lines(found, config):
        say(line)
    say(f"tune: best.yaml and all trials in {journal.place.root}")
    return found


def search_images(config: Config, text: str | None, image: Path | None, top: int) -> list[Hit]:
    """The indexed images nearest to a sentence or to an image file. Needs storage, not Ray."""
    run = Storage(config.run_root)
    index = read_index(run)
    model = load_model(run.uri("weights"))
    if text is not None:
        return index.search(model.encode_text([text])[0], top)
    try:
        with Image.open(image or "") as picture:
            return index.search(model.encode_image([picture])[0], top)
    except (OSError, UnidentifiedImageError) as error:
        raise RunError(f"--image {image}: cannot be read as an image: {error}") from None
