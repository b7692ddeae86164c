"""Ctrl-C in mid-run: no process is left, and the same command goes on from the last checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import override

from clip_ray.config import Config
from clip_ray.config_file import dump_config
from clip_ray.pipeline import prepare_data, session
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints
from clip_ray.tuning.journal import Journal, journal_of

pytestmark = [pytest.mark.alone, pytest.mark.cluster, pytest.mark.s3, pytest.mark.timeout(600)]
MARK = "CLIP_RAY_TEST_MARK"


def test_sigint_leaves_no_process_and_a_resumable_run(small_config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(small_config))
    with session(small_config, print):
        prepare_data(small_config, print)
    command = [sys.executable, "-m", "clip_ray", "train", str(path), "train.epochs=12"]
    mark = uuid.uuid4().hex
    driver = subprocess.Popen(
        command, env=os.environ | {MARK: mark}, stderr=subprocess.PIPE, text=True
    )
    checkpoints = Checkpoints(Storage(small_config.run_root))
    await_checkpoint(checkpoints, driver, timeout_s=180)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "interrupted; the same command goes on from the last checkpoint" in said
    assert "Traceback" not in said
    assert processes_with(mark, timeout_s=20) == []
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    resumed = re.search(r"resumes at step (\d+) of 48", again.stderr)
    assert resumed is not None
    assert int(resumed[1]) >= 4
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 48


def test_sigint_ends_a_sweep_that_the_same_command_goes_on_with(
    small_config: Config, tmp_path: Path
) -> None:
    config = override(small_config, [
        "train.epochs=4", "cluster.num_workers=1", "tune.max_trials=2", "tune.concurrent=1",
        "tune.search=random", "tune.scheduler=none",
    ])  # fmt: skip
    path, space = tmp_path / "config.yaml", tmp_path / "space.yaml"
    path.write_text(dump_config(config))
    space.write_text("space: {optim.lr: {loguniform: [1.0e-4, 1.0e-3]}}")
    command = [sys.executable, "-m", "clip_ray", "tune", str(path), f"--space={space}"]
    mark = uuid.uuid4().hex
    driver = subprocess.Popen(
        command, env=os.environ | {MARK: mark}, stderr=subprocess.PIPE, text=True
    )
    journal = journal_of(config)
    await_report(journal, driver, timeout_s=240)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    assert "interrupted; the same command goes on from the last checkpoint" in said
    assert "Traceback" not in said
    assert processes_with(mark, timeout_s=20) == []
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "tune: 2 trials to run, 0 have ended" in again.stderr
    assert [(t.state, t.epochs) for t in journal.trials()] == [("finished", 4)] * 2


def await_report(journal: Journal, driver: subprocess.Popen[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(trial.reports for trial in journal.trials()):
        assert driver.poll() is None, "the sweep ended before it was interrupted"
        assert time.monotonic() < deadline, "no report came"
        time.sleep(0.1)


def await_checkpoint(
    checkpoints: Checkpoints, driver: subprocess.Popen[str], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while checkpoints.newest() is None:
        assert driver.poll() is None, "training ended before it was interrupted"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.5)


def processes_with(mark: str, timeout_s: float) -> list[str]:
    """The command lines of all processes whose environment holds the mark."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                    left.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it ended, or is not ours
                continue
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)
