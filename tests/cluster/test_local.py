"""A local cluster: nodes come with the work and go again, and only who has the token gets in."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from ray_head import ray_head
from secrets_search import holders

from clip_ray.cluster.access import Access, access
from clip_ray.cluster.local import LocalCluster, running
from clip_ray.cluster.processes import recall
from clip_ray.config_file import shipped
from clip_ray.data.shapes import ShapesSpec, write_shapes
from clip_ray.embedded_s3 import embedded_s3
from clip_ray.errors import RunError
from clip_ray.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.timeout(600)]
IDLE_S = 15
PLANTED = {
    name: f"planted-{name.lower()}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY")
}
OVERRIDES = [
    "data.source=raw", "data.zero_shot_source=raw/zero-shot", "data.row_group_rows=8",
    "data.shuffle_window_rows=64", "train.global_batch=32", "train.epochs=1",
]  # fmt: skip


def clip_ray(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in `folder`, whose cluster it finds; nothing of the tests' S3 is in its way."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    return subprocess.run(
        [sys.executable, "-m", "clip_ray", *arguments],
        cwd=folder,
        env=own | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a cluster of 0 to 3 nodes runs, beside a small raw data set."""
    folder = tmp_path_factory.mktemp("local")
    write_shapes(folder / "raw", ShapesSpec(train=64, val=8, test=8, zero_shot_per_class=1))
    config = yaml.safe_load(shipped("raycluster/local.yaml").read_text())
    config["idle_timeout_minutes"] = IDLE_S / 60
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    started = clip_ray(folder, "cluster", "start", "cluster.yaml", "--min", "0", "--max", "3")
    assert started.returncode == 0, started.stderr
    assert "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:" in started.stdout
    yield folder
    clip_ray(folder, "cluster", "stop")


def cluster_in(folder: Path) -> LocalCluster:
    found = running(folder / ".clip-ray" / "cluster")
    assert found is not None
    return found


def nodes(folder: Path) -> int:
    """How many nodes Ray knows to be alive beside the head."""
    found = access(cluster_in(folder).dashboard, folder=folder / ".clip-ray" / "cluster")
    return sum(not node["is_head_node"] for node in found.nodes())


@contextlib.contextmanager
def nodes_meanwhile(folder: Path) -> Iterator[set[int]]:
    """How many nodes there are at each look, once a second, as long as the context lasts."""
    counts, over = set[int](), threading.Event()

    def look() -> None:
        while not over.wait(1):
            with contextlib.suppress(RunError, OSError):  # busy: the next look tells
                counts.add(nodes(folder))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield counts
        finally:
            over.set()
            looking.result(timeout=60)


def await_nodes(folder: Path, count: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while nodes(folder) != count:
        assert time.monotonic() < deadline_s, f"{nodes(folder)} nodes, not {count}"
        time.sleep(1)


def test_nodes_come_with_the_work_and_go_again(folder: Path) -> None:
    assert nodes(folder) == 0
    config = [str(shipped("jobs/configs/shapes.yaml")), *OVERRIDES]
    with nodes_meanwhile(folder) as counts:
        prepared = clip_ray(folder, "submit", "prepare", *config)
    assert prepared.returncode == 0, prepared.stdout[-2000:] + prepared.stderr[-2000:]
    assert 1 <= max(counts) <= 3
    with nodes_meanwhile(folder) as counts:
        trained = clip_ray(folder, "submit", "train", *config, **PLANTED)
    assert trained.returncode == 0, trained.stdout[-2000:] + trained.stderr[-2000:]
    assert "train: step 2/2" in trained.stdout  # the followed log
    assert 1 <= max(counts) <= 3
    jobs = clip_ray(folder, "jobs").stdout.splitlines()
    assert [line.split()[:2] for line in jobs] == [
        ["shapes-2", "SUCCEEDED"], ["shapes-1", "SUCCEEDED"],
    ]  # fmt: skip
    await_nodes(folder, 0, timeout_s=IDLE_S + 60)
    assert "head" in clip_ray(folder, "cluster", "status").stdout


def test_a_second_job_of_a_run_is_refused_while_one_lives(folder: Path) -> None:
    # No node of the cluster is large enough: it waits for ever.
    config = [str(shipped("jobs/configs/shapes.yaml")), *OVERRIDES, "name=waits"]
    config += ["cluster.cpus_per_worker=64"]
    first = clip_ray(folder, "submit", "train", *config, "--detach")
    assert first.returncode == 0, first.stderr
    second = clip_ray(folder, "submit", "train", *config)
    assert second.returncode == 1
    assert "a run has one job at a time; clip-ray logs waits-1 follows it" in second.stderr
    stopped = clip_ray(folder, "stop", "waits")
    assert "waits-1 has stopped" in stopped.stderr
    third = clip_ray(folder, "submit", "train", *config, "--detach")
    assert "submit: waits-2" in third.stderr
    clip_ray(folder, "stop", "waits-2")


def test_ctrl_c_may_stop_the_job_at_a_last_checkpoint(folder: Path) -> None:
    config = [str(shipped("jobs/configs/shapes.yaml")), *OVERRIDES, "name=long"]
    config += ["train.epochs=100000", "checkpoint.every_epochs=null", "logging.every_steps=1"]
    with on_a_terminal(folder, "submit", "train", *config) as (submit, terminal):
        terminal.await_text("train: step 4/")
        submit.send_signal(signal.SIGINT)
        terminal.await_text("stop long-1, too? [y/N]")
        terminal.answer("y")
        terminal.await_text("stop: long-1 has stopped")
        assert submit.wait(60) == 0
    listed = clip_ray(folder, "runs", config[0], "--json")
    steps = {run["name"]: run["step"] for run in map(json.loads, listed.stdout.splitlines())}
    assert steps["shapes"] == 2
    assert steps["long"] >= 4


class Terminal:
    """What a command shows, and what a person types."""

    def __init__(self, file_number: int) -> None:
        self._file_number, self._shown = file_number, ""

    def await_text(self, text: str, timeout_s: float = 240) -> None:
        deadline_s = time.monotonic() + timeout_s
        while text not in self._shown:
            assert time.monotonic() < deadline_s, f"not shown: {text!r} in {self._shown[-2000:]}"
            if select.select([self._file_number], [], [], 1)[0]:
                self._shown += os.read(self._file_number, 65536).decode(errors="replace")

    def answer(self, text: str) -> None:
        os.write(self._file_number, f"{text}\n".encode())


@contextlib.contextmanager
def on_a_terminal(
    folder: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    ours, theirs = pty.openpty()
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    command = [sys.executable, "-m", "clip_ray", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=own, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        yield process, Terminal(ours)
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)


def test_no_secret_is_written_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 server's key, the cluster's token, and what who submits has in the environment."""
    cluster = folder / ".clip-ray" / "cluster"
    keys = (folder / ".clip-ray" / "s3" / "keys").read_text().split()
    token = (cluster / "token").read_text()
    secrets = [keys[-1], token, *PLANTED.values()]
    jobs = Access(cluster_in(folder).dashboard, token)
    (folder / "found").mkdir(exist_ok=True)
    (folder / "found" / "jobs.json").write_bytes(http_get(jobs, "/api/jobs/"))
    with embedded_s3(folder / ".clip-ray" / "s3") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        places = (folder / "found", cluster, ray_folder(cluster), Storage("s3://clip-ray"))
        assert holders(secrets, *places) == [str(cluster / "token")]
        assert holders(["RAY_JOB_STOP_WAIT_TIME_S"], folder / "found") != []  # it does find


def ray_folder(cluster: Path) -> Path:
    """Where the cluster's Ray has its logs, and what it has been told."""
    kept = recall(cluster / "nodes" / "head.json")
    assert kept is not None
    (option,) = [each for each in kept[0].cmdline() if each.startswith("--temp-dir=")]
    return Path(option.removeprefix("--temp-dir="))


def test_only_who_has_the_token_gets_in(folder: Path, tmp_path: Path) -> None:
    cluster = cluster_in(folder)
    right = Path(cluster.token_file).read_text()
    home = {"HOME": str(tmp_path)}  # where Ray would look for a token, too
    listing = ("jobs", "--address", cluster.dashboard)
    without = clip_ray(tmp_path, *listing, **home)
    assert (without.returncode, "wants a token" in without.stderr) == (1, True)
    wrong = clip_ray(tmp_path, *listing, RAY_AUTH_TOKEN="0" * 64, **home)
    assert (wrong.returncode, "refuses the token" in wrong.stderr) == (1, True)
    assert clip_ray(tmp_path, *listing, RAY_AUTH_TOKEN=right, **home).returncode == 0
    for token, status in ((None, 401), ("0" * 64, 403), (right, 200)):
        assert http_status(Access(cluster.dashboard, token)) == status
    for token, connects in (("0" * 64, False), (right, True)):
        assert driver_connects(cluster.gcs, token) == connects


def http_get(found: Access, path: str) -> bytes:
    request = urllib.request.Request(f"{found.dashboard}{path}", headers=found.headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


def http_status(found: Access) -> int:
    try:
        http_get(found, "/api/v0/nodes")
        return 200
    except urllib.error.HTTPError as error:
        return error.code


def driver_connects(gcs: str, token: str) -> bool:
    script = f"import ray; ray.init({gcs!r}); print(len(ray.nodes()))"
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | mode, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode == 0


def test_a_token_that_others_can_read_is_refused(folder: Path) -> None:
    token = Path(cluster_in(folder).token_file)
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o644)
    refused = clip_ray(folder, "jobs")
    token.chmod(0o600)
    assert refused.returncode == 1
    assert "has mode 0644: must be 0600" in refused.stderr


def test_nothing_is_sent_to_a_cluster_that_wants_no_token(folder: Path) -> None:
    with ray_head({}, open_to_all=True) as other:
        address = ("--address", other["RAY_ADDRESS"])
        refused = clip_ray(folder, "jobs", *address)
        assert refused.returncode == 1
        assert "lets in everybody who reaches it" in refused.stderr
        assert clip_ray(folder, "jobs", *address, "--insecure").returncode == 0
        # The last test of this cluster: it ends without a trace, and the other one lives.
        clip_ray(folder, "cluster", "stop")
        assert not left_of(folder)
        assert clip_ray(folder, "jobs", *address, "--insecure").returncode == 0


def left_of(folder: Path) -> list[str]:
    """Processes that were started in `folder`, or for its cluster."""
    place, found = str(folder / ".clip-ray"), []
    for process in psutil.process_iter(["cmdline", "environ"]):
        token = (process.info["environ"] or {}).get("RAY_AUTH_TOKEN_PATH", "")
        if place in token or place in " ".join(process.info["cmdline"] or []):
            found.append(" ".join(process.info["cmdline"] or []))
    return found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["--min", "4", "--max", "3"], "min_workers is 4: must be at most max_workers (3)"),
        (["no.yaml"], "no.yaml: cannot be read"),
    ],
)
def test_a_wrong_cluster_is_refused(tmp_path: Path, fields: list[str], said: str) -> None:
    refused = clip_ray(tmp_path, "cluster", "start", *fields)
    assert refused.returncode == 2
    assert said in refused.stderr
