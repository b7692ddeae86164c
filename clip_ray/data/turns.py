"""Turns that the reader processes of one stream take on a node."""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE = "turns.lock"


def new_stream() -> int:
    """A number that no other stream has."""
    return secrets.randbits(62)


class Turns:
    """One turn at a time among all processes of a node that name the same folder and stream.

    It is a lock on one byte, which the file need not have, and ends with the process that holds it.
    """

    def __init__(self, folder: Path, stream: int) -> None:
        self._file, self._stream = (folder / _FILE).open("w"), stream

    @contextmanager
    def take(self) -> Iterator[None]:
        """Waits for the others. Not for two threads of a process at once."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._stream)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._stream)
