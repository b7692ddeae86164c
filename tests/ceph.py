"""A real, strict S3 server: Ceph's gateway over one monitor and one in-memory OSD, on loopback.

Needs root and the packages that `make test-s3` installs. What it holds is gone with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_ray.ports import free_ports

START_TIMEOUT_S = 90
COMMAND_TIMEOUT_S = 60
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}
# `mon data avail`: else the monitor ends itself on a disk that is 95 % full.
CONFIG = """
[global]
fsid = {fsid}
mon host = {monitor}
mon initial members = a
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
mon data avail warn = 0
mon data avail crit = 0
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.$pid.asok
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
ms mon client mode = crc
ms client mode = crc
"""


@contextlib.contextmanager
def ceph_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Runs Ceph over `folder`; yields the environment that its clients need.

    Raises RuntimeError, with the end of each log, where it does not stand up.
    """
    folder = folder.resolve()
    port, *monitor_ports = free_ports(3)
    daemons: list[subprocess.Popen[Any]] = []
    try:
        try:
            _start(folder, port, monitor_ports, daemons)
        except (subprocess.SubprocessError, RuntimeError, TimeoutError) as error:
            ended = [(daemon.args, daemon.poll()) for daemon in daemons]
            raise RuntimeError(
                f"Ceph does not stand up: {error}; exit codes {ended}{_last_words(folder)}"
            ) from error
        yield KEYS | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }
    finally:
        for daemon in reversed(daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait(10)


def _start(
    folder: Path, port: int, monitor_ports: list[int], daemons: list[subprocess.Popen[Any]]
) -> None:
    """Starts all that Ceph needs, each in a process group of its own, and adds it to `daemons`."""

    def run(*command: str) -> None:
        subprocess.run(command, check=True, timeout=COMMAND_TIMEOUT_S, **_in(folder))

    def start(*command: str) -> None:
        daemons.append(subprocess.Popen([*command, "-f"], start_new_session=True, **_in(folder)))

    for name in ("mon", "osd"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    fsid, osd_uuid = str(uuid.uuid4()), str(uuid.uuid4())
    monitor = f"[v2:127.0.0.1:{monitor_ports[0]},v1:127.0.0.1:{monitor_ports[1]}]"
    (folder / "ceph.conf").write_text(
        CONFIG.format(fsid=fsid, monitor=monitor, folder=folder, port=port)
    )
    run("monmaptool", "--create", "--addv", "a", monitor, "--fsid", fsid, "monmap")
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap")
    start("ceph-mon", "-i", "a")
    run("ceph", "osd", "new", osd_uuid, "0")
    run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
    start("ceph-osd", "-i", "0")
    start("radosgw", "-n", "client.rgw")
    _await_answer(port, daemons)
    run(
        "radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test",
        "--display-name=test", f"--access-key={KEYS['AWS_ACCESS_KEY_ID']}",
        f"--secret-key={KEYS['AWS_SECRET_ACCESS_KEY']}",
    )  # fmt: skip


def _last_words(folder: Path) -> str:
    logs = {log.name: log.read_text(errors="replace").split() for log in folder.glob("*.log")}
    return "".join(f"\n{name}: … {' '.join(words[-40:])}" for name, words in logs.items() if words)


def _in(folder: Path) -> dict[str, Any]:
    log = (folder / "start.log").open("ab")
    return {
        "cwd": folder,
        "env": os.environ | {"CEPH_CONF": str(folder / "ceph.conf")},
        "stdin": subprocess.DEVNULL,
        "stdout": log,
        "stderr": log,
    }


def _await_answer(port: int, daemons: list[subprocess.Popen[Any]]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        for daemon in daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args} ended")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(f"Ceph did not answer within {START_TIMEOUT_S} s")
