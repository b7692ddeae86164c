"""Processes on the nodes of a cluster that look around there; a node that is silent is told of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray.cluster.checks import MachineFacts, machine_facts
from clip_ray.cluster.judge import Node

THREADS = 8
HEAD_RESOURCE = "node:__internal_head__"


class Probe:
    """Runs functions where it is. One that hangs leaves threads for others."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns there."""
        return function(*arguments)


Probes = Mapping[str, Any]  # by the node's name


def alive_nodes() -> list[Node]:
    """The nodes of the connected cluster, the head first; those of one name are told apart."""
    found = [node for node in ray.nodes() if node["Alive"]]
    names = [node["NodeName"] for node in found]
    nodes = [
        Node(
            name=name if names.count(name) == 1 else f"{name}/{each['NodeID'][:6]}",
            node_id=each["NodeID"],
            address=each["NodeManagerAddress"],
            is_head=HEAD_RESOURCE in each["Resources"],
            gpus=each["Resources"].get("GPU", 0),
            object_store_bytes=each["Resources"].get("object_store_memory", 0),
        )
        for each, name in zip(found, names, strict=True)
    ]
    return sorted(nodes, key=lambda node: (not node.is_head, node.name))


@contextlib.contextmanager
def probes(nodes: Sequence[Node]) -> Iterator[Probes]:
    """A probe on each node while the block runs."""
    started = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        actor = ray.remote(Probe).options(
            num_cpus=0, max_concurrency=THREADS, scheduling_strategy=here
        )
        started[node.name] = actor.remote()
    try:
        yield started
    finally:
        for probe in started.values():
            ray.kill(probe)


class Answers:
    """What was asked of each node: `found` by the node's name, and why others are `silent`."""

    def __init__(self, calls: Mapping[str, ray.ObjectRef[Any]], timeout_s: float) -> None:
        self.found: dict[str, Any] = {}
        self.silent: dict[str, str] = {}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        for name, call in calls.items():
            try:
                self.found[name] = ray.get(call, timeout=0)
            except GetTimeoutError:
                self.silent[name] = f"no answer within {timeout_s:g} s"
            except Exception as error:  # whatever it is that the node raised
                self.silent[name] = _last_line(error)


def ask(probes: Probes, timeout_s: float, function: Callable[..., Any], *given: Any) -> Answers:
    """The same function on each node, at once."""
    calls = {name: probe.run.remote(function, *given) for name, probe in probes.items()}
    return Answers(calls, timeout_s)


def machine_here() -> MachineFacts:
    """The facts of the node where it is called."""
    return machine_facts(ray.get_runtime_context().get_temp_dir())


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
