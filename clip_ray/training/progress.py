"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows training steps as they come: images/s, loss, time left."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._bar: tqdm[Any] | None = None
        self._last_line_at = 0.0

    def show(self, state: dict[str, Any]) -> None:
        """`state`: a log entry of the loop, with total_steps and left_s."""
        if sys.stderr.isatty():
            self._show_bar(state)
            return
        final = state["step"] == state["total_steps"]
        now = time.monotonic()
        if (
            final
            or "image_retrieval_recall@1" in state
            or now - self._last_line_at >= self._interval_s
        ):
            self._last_line_at = now
            print(_line(state), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.close()

    def _show_bar(self, state: dict[str, Any]) -> None:
        if self._bar is None:
            self._bar = tqdm(total=state["total_steps"], desc="train", unit="step")
            self._bar.initial = state["step"] - 1
        self._bar.n = state["step"]
        self._bar.set_postfix_str(f"{state['images_per_s']:.0f} images/s, loss {state['loss']:.3f}")


def _line(state: dict[str, Any]) -> str:
    step, total = state["step"], state["total_steps"]
    recall = state.get("image_retrieval_recall@1")
    validated = "" if recall is None else f", val text→image R@1 {recall:.1%}"
    return (
        f"train: step {step}/{total}, epoch {state['epoch']:.1f}, loss {state['loss']:.3f}, "
        f"scale {state['scale']:.1f}, {state['images_per_s']:.0f} images/s{validated}, "
        f"{tqdm.format_interval(state['left_s'])} left"
    )
