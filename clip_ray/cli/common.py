"""What the commands share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip_ray.config import Config
from clip_ray.config_file import load_config

if TYPE_CHECKING:
    from clip_ray.storage import Storage

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Fields laid over it: optim.lr=1e-3 train.epochs=5")
]


@contextlib.contextmanager
def storage_at(
    place: str, of: Callable[[Config], str], overrides: Sequence[str] = ()
) -> Iterator[Storage]:
    """The storage s3://…, or the one that `of` names of a YAML file, while the block runs."""
    from clip_ray.embedded_s3 import storage_session
    from clip_ray.storage import Storage

    if place.startswith("s3://"):
        yield Storage(place)
        return
    resolved = load_config(Path(place), overrides)
    with storage_session(resolved.storage):
        yield Storage(of(resolved))


def say(line: str) -> None:
    """A line to whoever started the command, apart from its result."""
    print(line, file=sys.stderr, flush=True)
