"""Compiled towers in a real two-worker run, in a Ray of its own: that one has its compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import override
from learning import OPTIONS, check_that_it_learns

from clip_ray.config import Config
from clip_ray.pipeline import prepare_data, session


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_compiled_towers_learn_though_a_worker_dies_while_it_compiles(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(Path(__file__).parent.parent / "dying_compiler.py"))
    monkeypatch.setenv("CLIP_RAY_TEST_DIED", str(tmp_path / "died"))
    config = override(small_config, OPTIONS["compile"])
    with session(config, lambda line: None):
        prepare_data(config, lambda line: None)
        check_that_it_learns(config)
    assert (tmp_path / "died").exists()
