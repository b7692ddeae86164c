"""The `clip-ray` command."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from clip_ray.cli import clusters, steps, sweeps
from clip_ray.cli.common import say
from clip_ray.errors import ConfigError

INTERRUPTED = 130
COMMANDS = (
    steps.demo, steps.prepare, steps.quarantine, steps.train, steps.checkpoints, steps.evaluate,
    sweeps.tune, sweeps.tune_report, steps.search, steps.config,
    clusters.doctor, clusters.submit, clusters.jobs, clusters.logs, clusters.stop, clusters.runs,
)  # fmt: skip

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in COMMANDS:
    app.command()(command)
app.add_typer(clusters.cluster, name="cluster")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train CLIP on Flickr30k with Ray and DeepSpeed."""


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
            say("interrupted; the same command goes on from the last checkpoint")
        raise
    except Exception as error:  # the user gets one line, not a traceback
        _fail(error, 1, debug)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(error: BaseException, code: int, debug: bool) -> None:
    if debug:
        raise error
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.exit(code)
