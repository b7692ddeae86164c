"""A sweep's trials as a table: on the terminal while it runs, and as lines at its end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from clip_ray.config import Config
from clip_ray.tuning.book import Book
from clip_ray.tuning.journal import Trial, ranked

# Of a sweep of hundreds, those that matter fit on a screen.
SHOWN = 20


@contextlib.contextmanager
def screen(book: Book, config: Config) -> Iterator[None]:
    """Shows the best trials on the terminal while the block runs; nothing where there is none."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return

    def render() -> Table:
        return table(list(book.trials.values()), config, SHOWN)

    # Lines that are said meanwhile stand above it.
    with Live(get_renderable=render, console=console, refresh_per_second=1, transient=True):
        yield


def table(trials: Sequence[Trial], config: Config, most: int | None = None) -> Table:
    """The trials, the best first."""
    shown = ranked(trials, config)[:most]
    fields = list(dict.fromkeys(name for trial in trials for name in trial.values))
    found = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "epoch", "hours", *config.tune.objectives, *fields):
        found.add_column(heading, overflow="fold")
    for trial in shown:
        figures = [_text(trial.figure(name)) for name in config.tune.objectives]
        values = [_text(trial.values.get(name, "")) for name in fields]
        hours = f"{trial.worker_hours:.3g}"
        found.add_row(trial.run, trial.state, str(trial.epochs), hours, *figures, *values)
    return found


def lines(trials: Sequence[Trial], config: Config) -> list[str]:
    """The table as lines of text."""
    console = Console(width=200, file=sys.stderr)
    with console.capture() as capture:
        console.print(table(trials, config))
    return [line.rstrip() for line in capture.get().splitlines()]


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
