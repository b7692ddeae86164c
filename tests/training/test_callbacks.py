"""What is said of a failure: its innermost cause, in a line."""

from __future__ import annotations

import pytest
import torch

from clip_ray.training.callbacks import root_cause


def test_what_a_compiler_advises_is_not_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch.compiler.reset()
    with pytest.raises(Exception, match="TORCHDYNAMO_VERBOSE") as raised:
        torch.compile(torch.sin)(torch.ones(3))
    assert "No working C++ compiler found" in root_cause(raised.value)


def test_a_cause_is_told_in_a_line() -> None:
    error = RuntimeError("in a worker")
    error.__cause__ = ValueError("a long story\nthe point\n")
    assert root_cause(error) == "ValueError: the point"
