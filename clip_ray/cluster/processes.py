"""Processes that outlive the command that started them: found again by a file, and ended."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil

GRACE_S = 15.0
HEAD = "head"


def remember(file: Path, pid: int, **facts: Any) -> None:
    """Keeps a process, and what else is to be known of it, in `file`."""
    # A pid alone may be another process's by the time it is read.
    kept = {"pid": pid, "created_s": psutil.Process(pid).create_time(), **facts}
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(kept))
    beside.replace(file)


def recall(file: Path) -> tuple[psutil.Process, dict[str, Any]] | None:
    """The process kept in `file` and its facts; None where it has ended."""
    try:
        facts = json.loads(file.read_text())
        process = psutil.Process(facts["pid"])
        same = process.create_time() == facts["created_s"]
        running = same and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, psutil.Error):
        return None
    return (process, facts) if running else None


def end(process: psutil.Process, grace_s: float = GRACE_S) -> None:
    """Ends a process with all that it has started; SIGKILL for what is left after `grace_s`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = process.children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs([process, *family], timeout=grace_s)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=grace_s)


def end_nodes(folder: Path) -> None:
    """Ends a cluster's nodes, kept in `folder`: the head first, so that it starts no other."""
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stem != HEAD):
        if kept := recall(file):
            end(kept[0])
