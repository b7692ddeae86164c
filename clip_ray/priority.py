"""Whose turn it is on a local Ray: theirs that read and train, before theirs that wait for them."""

from __future__ import annotations

import os

# In the environment of a process that does not give way.
COMES_FIRST = {"CLIP_RAY_COMES_FIRST": "1"}
NICENESS = 15


def give_way() -> None:
    """Each process of a local Ray's job calls it at its start.

    Each of Ray's own actors wakes a hundred times a second, and on a laptop's few cores would
    interrupt a step each time.
    """
    if not COMES_FIRST.items() <= os.environ.items():
        os.nice(NICENESS)
