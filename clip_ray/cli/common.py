"""What the commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Fields laid over it: optim.lr=1e-3 train.epochs=5")
]


def say(line: str) -> None:
    """A line to whoever started the command, apart from its result."""
    print(line, file=sys.stderr, flush=True)
