"""What a check of the cluster says: findings, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

CLUSTER = "cluster"
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One check of one node: what was seen, and, unless it is right, one line of advice."""

    node: str
    check: str
    status: Status
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, and the bandwidth between the nodes where it could be measured."""

    nodes: Sequence[str]
    findings: Sequence[Finding]
    bytes_per_s: float | None

    @property
    def failures(self) -> int:
        """How many findings are failures."""
        return sum(finding.status == "fail" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "ok": self.failures == 0,
            "nodes": list(self.nodes),
            "gb_per_s": self.bytes_per_s and round(self.bytes_per_s / 1e9, 3),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def table(self) -> str:
        """A line for each finding, those of nodes that are alike in one; advice below its line."""
        alike: dict[Finding, list[str]] = {}
        for each in self.findings:
            alike.setdefault(Finding("", each.check, each.status, each.seen, each.advice), [])
            alike[Finding("", each.check, each.status, each.seen, each.advice)].append(each.node)
        names = [self._named(nodes) for nodes in alike.values()]
        widths = max(map(len, names), default=0), max((len(f.check) for f in alike), default=0)
        return "\n".join(
            line
            for name, finding in zip(names, alike, strict=True)
            for line in _lines(name, finding, widths)
        )

    def _named(self, nodes: list[str]) -> str:
        if len(nodes) > 1 and len(nodes) == len(self.nodes):
            return f"all {len(nodes)} nodes"
        return ", ".join(nodes)


def _lines(name: str, finding: Finding, widths: tuple[int, int]) -> Iterable[str]:
    yield f"{finding.status:4}  {name:{widths[0]}}  {finding.check:{widths[1]}}  {finding.seen}"
    if finding.advice:
        yield f"      -> {finding.advice}"
