"""The `clip-ray` command: each sub-command checks its config, then runs one part of the way."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clip_ray.config import Config
from clip_ray.config_file import dump_config, load_config
from clip_ray.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Fields laid over it: optim.lr=1e-3 train.epochs=5")
]
INTERRUPTED = 130
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, start nothing.")]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    Exit code 2: the config is wrong; 1: the run failed; 130: interrupted by SIGINT or SIGTERM.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"], prog_name="clip-ray")
    except ConfigError as error:
        _fail(error, 2, debug)
    except SystemExit as error:
        if error.code == INTERRUPTED:  # typer's answer to a KeyboardInterrupt
            _say("interrupted; the same command goes on from the last checkpoint")
        raise
    except Exception as error:  # the user gets one line, not a traceback
        _fail(error, 1, debug)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train CLIP on Flickr30k with Ray and DeepSpeed."""


@app.command()
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
    resolved = load_config(demo_config_path(), [*places, *(overrides or ())])
    from clip_ray.demo import run_demo

    print(json.dumps(run_demo(resolved, _say)))


@app.command()
def prepare(path: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Turn the raw data set into Parquet shards and a manifest in S3.

    Example: clip-ray prepare jobs/configs/shapes.yaml
    """
    resolved = load_config(path, overrides or ())
    from clip_ray import pipeline

    pipeline.check(resolved)
    if dry_run:
        return _say("prepare: config, model and storage are right; nothing was started")
    with pipeline.session(resolved, _say):
        pipeline.prepare_data(resolved, _say)


@app.command()
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
        with pipeline.session(resolved, _say):
            pipeline.requeue_data(resolved, _say)
    with storage_session(resolved.storage):
        entries = pipeline.quarantine(resolved)
    for entry in entries:
        line = f"{entry.name}  {entry.split or '-'}  {entry.reason}: {entry.detail}"
        print(entry.model_dump_json() if as_json else line)
    _say(f"quarantine: {len(entries)} records")


@app.command()
def train(
    path: ConfigPath,
    overrides: Overrides = None,
    weights: Annotated[
        str | None, typer.Option("--from", help="Weights folder that a new run begins with.")
    ] = None,
    fork: Annotated[
        str | None, typer.Option(help="RUN[@STEP] whose whole state a new run begins with.")
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
        return _say("train: config, model and storage are right; nothing was started")
    with pipeline.session(resolved, _say):
        pipeline.train_model(resolved, _say)


@app.command()
def checkpoints(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A YAML file, or s3://…/runs/NAME.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """List a run's checkpoints: step, epoch, R@1, size, and what is incomplete.

    Example: clip-ray checkpoints jobs/configs/shapes.yaml
    """
    from clip_ray.embedded_s3 import storage_session
    from clip_ray.storage import Storage
    from clip_ray.training.checkpoint import list_checkpoints

    if run.startswith("s3://"):
        found = list_checkpoints(Storage(run))
    else:
        resolved = load_config(Path(run), overrides or ())
        with storage_session(resolved.storage):
            found = list_checkpoints(Storage(resolved.run_root))
    for line in found:
        print(json.dumps(asdict(line)) if as_json else line)
    _say(f"checkpoints: {sum(line.complete for line in found)} complete of {len(found)}")


@app.command()
def evaluate(path: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measure retrieval and zero-shot classification, and index the images for search.

    Example: clip-ray evaluate jobs/configs/shapes.yaml evaluation.split=val
    """
    resolved = load_config(path, overrides or ())
    from clip_ray import pipeline

    pipeline.check(resolved)
    if dry_run:
        return _say("evaluate: config, model and storage are right; nothing was started")
    with pipeline.session(resolved, _say):
        print(json.dumps(pipeline.evaluate_model(resolved, _say)))


@app.command()
def tune(
    path: ConfigPath,
    overrides: Overrides = None,
    space: Annotated[Path, typer.Option(help="A YAML file of distributions.")] = Path(
        "tune_spaces/temperature_lr.yaml"
    ),
    trials: Annotated[int, typer.Option(min=1, help="Points to try.")] = 8,
    dry_run: DryRun = False,
) -> None:
    """Search a space of config fields for the best R@1 on the val split.

    Example: clip-ray tune jobs/configs/shapes.yaml --space tune_spaces/temperature_lr.yaml
    """
    from clip_ray.tuning.space import load_space

    resolved = load_config(path, overrides or ())
    checked_space = load_space(space, resolved)
    from clip_ray import pipeline

    pipeline.check(resolved)
    if dry_run:
        return _say("tune: config, space, model and storage are right; nothing was started")
    # Tune frees the workers of a stopped trial through the dashboard.
    with pipeline.session(resolved, _say, dashboard=True):
        pipeline.prepare_data(resolved, _say)
        pipeline.tune_model(resolved, checked_space, trials, _say)


@app.command()
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
    resolved = load_config(config or demo_config_path())
    from clip_ray import pipeline
    from clip_ray.embedded_s3 import storage_session

    with storage_session(resolved.storage):
        hits = pipeline.search_images(resolved, text, image, top)
    if as_json:
        return print(json.dumps([asdict(hit) for hit in hits]))
    for hit in hits:
        print(f"{hit.filename}  {hit.score:.3f}  {' | '.join(hit.captions)}")


@app.command()
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


def demo_config_path() -> Path:
    """The config of the embedded data set, installed with the package."""
    package = Path(__file__).parent
    in_checkout = package.parent / "jobs" / "configs" / "shapes.yaml"
    return in_checkout if in_checkout.exists() else package / "configs" / "shapes.yaml"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(error: BaseException, code: int, debug: bool) -> None:
    if debug:
        raise error
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.exit(code)
