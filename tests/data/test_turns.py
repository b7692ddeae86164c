"""Turns among processes."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from clip_ray.data.turns import Turns, new_stream

pytestmark = pytest.mark.timeout(120)


def take(folder: Path, stream: int, connection: Connection) -> None:
    with Turns(folder, stream).take():
        connection.send("mine")
        connection.recv()


def test_a_turn_is_of_one_process_of_a_stream_and_ends_with_it(tmp_path: Path) -> None:
    context, stream = multiprocessing.get_context("spawn"), new_stream()
    processes, connections = [], []
    for number in (stream, stream, new_stream()):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=take, args=(tmp_path, number, theirs)))
        connections.append(ours)
    first, second, of_another = connections
    try:
        processes[0].start()
        assert first.poll(60)
        for process in processes[1:]:
            process.start()
        assert of_another.poll(60)
        assert not second.poll(1)
        processes[0].kill()
        assert second.poll(60)
    finally:
        for process in processes:
            process.kill()
            process.join()
