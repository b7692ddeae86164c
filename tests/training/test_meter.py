"""FLOPs against published figures, and communication as far as nothing else was done."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import SHAPES_YAML
from process_group import run_ranks
from torch.profiler import ProfilerActivity, profile

from clip_ray.collectives import all_gather, barrier, rank
from clip_ray.config_file import load_config
from clip_ray.training.flops import StepFlops
from clip_ray.training.hardware import peak_flops
from clip_ray.training.meter import exposed_communication_s


def test_flops_are_the_published_ones() -> None:
    """open_clip's profile of ViT-B-32: 14.78 GFLOPs for an image and a text, forward."""
    config = load_config(SHAPES_YAML, ["model.preset=vit-b-32", "train.global_batch=2"])
    assert StepFlops(config, 49408)(77) / 2 / 3 / 1e9 == pytest.approx(14.78, rel=0.01)


def test_a_frozen_tower_has_no_backward() -> None:
    config = load_config(SHAPES_YAML, ["model.preset=vit-b-32", "train.global_batch=2"])
    locked = load_config(
        SHAPES_YAML,
        ["model.preset=vit-b-32", "train.global_batch=2", "optim.image.trained_groups=0"],
    )
    saved = StepFlops(config, 49408)(77) - StepFlops(locked, 49408)(77)
    assert saved / 2 / 2 / 1e9 == pytest.approx(8.82, rel=0.02)  # the image tower's forward


def test_the_peak_of_a_cpu_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") > 1e9


def late_by_half_a_second() -> float:
    barrier()
    with profile(activities=[ProfilerActivity.CPU], acc_events=False) as profiler:
        if rank() == 1:
            time.sleep(0.5)
        all_gather(torch.ones(4))
    return exposed_communication_s(profiler)


@pytest.mark.cluster
def test_waiting_for_another_rank_is_communication() -> None:
    waited_s, late_s = run_ranks(2, late_by_half_a_second)
    assert 0.4 < waited_s < 1.5
    assert late_s < 0.2
