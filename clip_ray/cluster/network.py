"""The network between the nodes, by an all-reduce; where it is cut or slow, which node's it is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clip_ray.cluster.findings import CLUSTER, Finding
from clip_ray.cluster.judge import Node
from clip_ray.cluster.probes import Answers, Probes, probes
from clip_ray.collectives import all_reduce_bytes_per_s
from clip_ray.ports import free_ports

TIMEOUT_S = 20  # of the group's, which says more than ours does
GRACE_S = 25  # beside it, for a process that is started and imports torch
# Less makes each step of a model as small as ViT-B/32 wait for seconds.
FLOOR_BYTES_PER_S = {"gloo": 50e6, "nccl": 1e9}
LINK_ADVICE = (
    "open all ports among the nodes, and name the interface that joins them: GLOO_SOCKET_IFNAME, "
    "NCCL_SOCKET_IFNAME"
)
SLOW_ADVICE = "look at its link: the interface, EFA or the instance type, one placement group"


@dataclass
class Outcome:
    """Of one group: its rate, or why each of these nodes could not take part."""

    bytes_per_s: float | None
    errors: dict[str, str] = field(default_factory=dict)

    def wrong(self, kind: str) -> bool:
        """Whether there is no rate, or one below the floor."""
        return self.bytes_per_s is None or self.bytes_per_s < FLOOR_BYTES_PER_S[kind]

    def shown(self) -> str:
        """In a line."""
        if self.bytes_per_s is not None:
            return f"{self.bytes_per_s / 1e9:.2f} GB/s"
        return "; ".join(f"{name}: {error}" for name, error in self.errors.items())


def network(nodes: Sequence[Node], started: Probes, kind: str) -> tuple[Outcome, list[Finding]]:
    """The all-reduce of all nodes, `kind` of gloo or nccl, and what it says of them."""
    if len(nodes) < 2:
        return Outcome(None), [Finding(CLUSTER, "network", "ok", "there is one node only")]
    whole = _all_reduce([nodes], [started], kind)[0]
    if not whole.wrong(kind):
        shown = f"all-reduce ({kind}) of {len(nodes)} nodes: {whole.shown()}"
        return whole, [Finding(CLUSTER, "network", "ok", shown)]
    if len(nodes) == 2:
        return whole, [_found(f"{nodes[0].name}, {nodes[1].name}", whole, kind)]
    return whole, pair_findings([node.name for node in nodes], _pairs(nodes, kind), kind, whole)


def pair_findings(
    names: Sequence[str], pairs: dict[tuple[str, str], Outcome], kind: str, whole: Outcome
) -> list[Finding]:
    """The nodes none of whose pairs are right; else the pairs that are not; else the whole."""
    found = []
    for name in names:
        own = [outcome for pair, outcome in pairs.items() if name in pair]
        if all(outcome.wrong(kind) for outcome in own):
            found.append(_found(name, own[0], kind))
    wrong = [(pair, outcome) for pair, outcome in pairs.items() if outcome.wrong(kind)]
    found = found or [_found(", ".join(pair), outcome, kind) for pair, outcome in wrong]
    return found or [_found(CLUSTER, whole, kind)]


def _found(name: str, outcome: Outcome, kind: str) -> Finding:
    advice = LINK_ADVICE if outcome.bytes_per_s is None else SLOW_ADVICE
    # What the node itself says is nearer to the cause than that its peer waits for it.
    own = outcome.errors.get(name) or outcome.shown()
    return Finding(name, "network", "fail", f"all-reduce ({kind}): {own}", advice)


def _pairs(nodes: Sequence[Node], kind: str) -> dict[tuple[str, str], Outcome]:
    """Each node with the next one around: in two or three rounds of pairs that share no node."""
    around = [(node, nodes[(i + 1) % len(nodes)]) for i, node in enumerate(nodes)]
    odd_one = around[-1:] if len(nodes) % 2 else []
    even = around[: len(around) - len(odd_one)]
    outcomes: dict[tuple[str, str], Outcome] = {}
    for pairs in filter(None, (even[::2], even[1::2], odd_one)):
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(probes(pair)) for pair in pairs]
            found = _all_reduce(pairs, started, kind)
        outcomes |= {(a.name, b.name): one for (a, b), one in zip(pairs, found, strict=True)}
    return outcomes


def _all_reduce(
    groups: Sequence[Sequence[Node]], started: Sequence[Probes], kind: str
) -> list[Outcome]:
    """An all-reduce in each group, at once."""
    begun = [_begin(nodes, there, kind) for nodes, there in zip(groups, started, strict=True)]
    return [_outcome(Answers(calls, TIMEOUT_S + GRACE_S)) for calls in begun]


def _begin(nodes: Sequence[Node], there: Probes, kind: str) -> dict[str, Any]:
    first, *_ = nodes
    port = there[first.name].run.remote(_free_port)  # Ray passes its value on
    return {
        node.name: there[node.name].run.remote(
            all_reduce_bytes_per_s,
            kind,
            first.address,
            port,
            rank,
            len(nodes),
            TIMEOUT_S,
            node.address,
        )
        for rank, node in enumerate(nodes)
    }


def _outcome(answers: Answers) -> Outcome:
    if answers.silent:
        return Outcome(None, answers.silent)
    return Outcome(min(answers.found.values()))


def _free_port() -> int:
    """Of the node where it is asked for."""
    return free_ports(1)[0]
