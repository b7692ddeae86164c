"""The embedded server: a real store on loopback that keeps its data and leaves no process."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from clip_ray.config import StorageConfig
from clip_ray.embedded_s3 import embedded_s3, storage_session
from clip_ray.errors import RunError
from clip_ray.ports import free_ports

pytestmark = pytest.mark.s3


def test_data_is_still_there_when_the_server_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = StorageConfig(root="s3://bucket/run", embedded_dir=str(tmp_path / "s3"))
    with storage_session(config) as storage:
        storage.write_bytes("a", b"kept")
        with storage_session(config) as same:  # a second command uses the server that runs
            assert same.read_bytes("a") == b"kept"
    assert "AWS_ENDPOINT_URL" not in os.environ
    assert stat.S_IMODE((tmp_path / "s3" / "keys").stat().st_mode) == 0o600
    with storage_session(config) as storage:
        assert storage.read_bytes("a") == b"kept"
    assert servers_over(tmp_path) == []


def test_a_port_that_is_taken_since_it_was_chosen_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []

    def draw(count: int) -> list[int]:
        ports = free_ports(count)
        drawn.append(ports if drawn else [taken.getsockname()[1], *ports[1:]])
        return drawn[-1]

    monkeypatch.setattr("clip_ray.embedded_s3.free_ports", draw)
    with socket.create_server(("127.0.0.1", 0)) as taken, embedded_s3(tmp_path) as environment:
        port = int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
        assert len(drawn) == 2
        assert port in drawn[1]
    assert servers_over(tmp_path) == []


def test_wrong_keys_are_refused(s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with (
        pytest.raises(RunError, match="access denied"),
        storage_session(StorageConfig(root="s3://clip-ray-tests")),
    ):
        pass


def servers_over(folder: Path) -> list[str]:
    command_lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command_lines.append((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [line for line in command_lines if str(folder) in line and "weed" in line]
