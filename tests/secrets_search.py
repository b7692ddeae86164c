"""Where a secret stands that should stand nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from clip_ray.storage import Storage


def holders(secrets: Iterable[str], *places: Path | Storage) -> list[str]:
    """The files below these folders, and the objects below these prefixes, that hold one."""
    wanted = [secret.encode() for secret in secrets]
    assert all(len(secret) >= 16 for secret in wanted)
    return [name for name, data in _contents(places) if any(secret in data for secret in wanted)]


def _contents(places: Iterable[Path | Storage]) -> Iterator[tuple[str, bytes]]:
    searched = 0
    for place in places:
        if isinstance(place, Storage):
            for key in place.keys(""):
                searched += 1
                yield f"{place.root}/{key}", place.read_bytes(key)
            continue
        for path in place.rglob("*"):
            if path.is_file() and not path.is_symlink():
                searched += 1
                yield str(path), path.read_bytes()
    assert searched > 0
