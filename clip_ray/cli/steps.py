"""The commands of the way: each checks its config, then runs one part of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clip_ray.cli.common import ConfigPath, Overrides, say, storage_at
from clip_ray.config import Config
from clip_ray.config_file import dump_config, load_config, shipped
from clip_ray.errors import ConfigError

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, start nothing.")]
RIGHT = "config, model and storage are right; nothing was started"


def demo(
    folder: Annotated[Path, typer.Option(help="Where raw data and storage lie.")] = Path(
        ".clip-ray"
    ),
    overrides: Overrides = None,
) -> None:
    """Run the whole way on the embedded data set; the last line printed is its result as JSON.

    Example: clip-ray demo
    """
    places = [
        f"storage.embedded_dir={folder / 's3'}",
        f"data.source={folder / 'raw' / 'shapes'}",
        f"data.zero_shot_source={folder / 'raw' / 'shapes' / 'zero-shot'}",
    ]
    resolved = load_config(shipped("jobs/configs/shapes.yaml"), [*places, *(overrides or ())])
    from clip_ray.demo import run_demo

    print(json.dumps(run_demo(resolved, say)))


def prepare(path: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Turn the raw data set into Parquet shards and a manifest in S3.

    Example: clip-ray prepare jobs/configs/shapes.yaml
    """
    resolved = load_config(path, overrides or ())
    from clip_ray import pipeline

    pipeline.check(resolved)
    if dry_run:
        return say(RIGHT)
    with pipeline.session(resolved, say):
        pipeline.prepare_data(resolved, say)


def quarantine(
    path: ConfigPath,
    overrides: Overrides = None,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="Try again what is listed, after a repair.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """List the records that prepare could not use, each with its reason.

    Example: clip-ray quarantine jobs/configs/shapes.yaml
    """
    resolved = load_config(path, overrides or ())
    from clip_ray import pipeline
    from clip_ray.embedded_s3 import storage_session

    if requeue:
        with pipeline.session(resolved, say):
            pipeline.requeue_data(resolved, say)
    with storage_session(resolved.storage):
        entries = pipeline.quarantine(resolved)
    for entry in entries:
        line = f"{entry.name}  {entry.split or '-'}  {entry.reason}: {entry.detail}"
        print(entry.model_dump_json() if as_json else line)
    say(f"quarantine: {len(entries)} records")


def train(
    path: ConfigPath,
    overrides: Overrides = None,
    weights: Annotated[
        str | None, typer.Option("--from", help="Weights folder that a new run begins with.")
    ] = None,
    fork: Annotated[
        str | None, typer.Option(help="RUN or RUN@STEP whose whole state a new run begins with.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train the run, or resume it from its newest checkpoint.

    Example: clip-ray train jobs/configs/shapes.yaml train.epochs=20
    """
    start = {"start.weights": weights, "start.fork": fork}
    given = [f"{field}={value}" for field, value in start.items() if value is not None]
    resolved = load_config(path, [*(overrides or ()), *given])
    from clip_ray import pipeline

    pipeline.check(resolved)
    if dry_run:
        return say(RIGHT)
    with pipeline.session(resolved, say):
        pipeline.train_model(resolved, say)


def checkpoints(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A YAML file, or s3://…/runs/NAME.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """List a run's checkpoints: step, epoch, R@1, size, and what is incomplete.

    Example: clip-ray checkpoints jobs/configs/shapes.yaml
    """
    from clip_ray.training.checkpoint import list_checkpoints

    with storage_at(run, lambda resolved: resolved.run_root, overrides or ()) as storage:
        found = list_checkpoints(storage)
    for line in found:
        print(json.dumps(asdict(line)) if as_json else line)
    say(f"checkpoints: {sum(line.complete for line in found)} complete of {len(found)}")


def evaluate(path: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measure retrieval and zero-shot classification, and index the images for search.

    Example: clip-ray evaluate jobs/configs/shapes.yaml evaluation.split=val
    """
    resolved = load_config(path, overrides or ())
    from clip_ray import pipeline

    pipeline.check(resolved)
    if dry_run:
        return say(RIGHT)
    with pipeline.session(resolved, say):
        print(json.dumps(pipeline.evaluate_model(resolved, say)))


def search(
    text: Annotated[str | None, typer.Option(help="A sentence.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image file.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file; default: the demo's.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many images.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find indexed images by a sentence or an image.

    Example: clip-ray search --text "a large red star at the top left" --top 5
    """
    if (text is None) == (image is None):
        raise ConfigError("search needs --text SENTENCE or --image FILE, one of the two")
    resolved = load_config(config or shipped("jobs/configs/shapes.yaml"))
    from clip_ray import pipeline
    from clip_ray.embedded_s3 import storage_session

    with storage_session(resolved.storage):
        hits = pipeline.search_images(resolved, text, image, top)
    if as_json:
        return print(json.dumps([asdict(hit) for hit in hits]))
    for hit in hits:
        print(f"{hit.filename}  {hit.score:.3f}  {' | '.join(hit.captions)}")


def config(
    path: ConfigPath,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print all fields as JSON schema.")
    ] = False,
) -> None:
    """Print the resolved config.

    Example: clip-ray config jobs/configs/shapes.yaml optim.lr=1e-3
    """
    resolved = load_config(path, overrides or ())
    print(json.dumps(Config.model_json_schema(), indent=2) if schema else dump_config(resolved))
