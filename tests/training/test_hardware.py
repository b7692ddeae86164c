"""What a worker computes on."""

from __future__ import annotations

import pytest
import torch

from clip_ray.training import hardware
from clip_ray.training.hardware import peak_flops, seed_generators


def check(device: str) -> None:
    places = [torch.device("cpu"), torch.device(device)]
    torch.manual_seed(7)
    drawn = [torch.rand(5, device=place) for place in places]
    seed_generators(torch.device(device), 7)
    assert all(torch.equal(torch.rand(5, device=d.device), d) for d in drawn)


def test_seeded_generators_draw_what_they_do_after_manual_seed() -> None:
    check("cpu")


@pytest.mark.gpu
def test_seeded_generators_of_a_gpu_do_too() -> None:
    check("cuda")


def test_peak_of_a_cpu_that_emulates_fp16_is_that_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 150e9, torch.float16: 0.6e9}
    monkeypatch.setattr(hardware, "_measured_flops", lambda device, dtype: rates[dtype])
    assert peak_flops.__wrapped__(torch.device("cpu"), "fp16") == 150e9
