"""Time and memory of the losses beside open_clip's ClipLoss: one rank's share of a global batch.

    python tests/bench/loss.py [--local 2048] [--ranks 8] [--large 8192] [--repeats 5] [--json]
                               [--tile 512] [--device cpu]

Each case is a fresh process that plays rank 0 of `--ranks` with torch's fake process group: every
tensor has its real size and every product is computed, but nothing is sent, so communication is
left out on all sides. Peak is the process's high-water mark (VmHWM, reset before the step), or
with `--device cuda` its allocator's, above what it holds with the features made. `--large` measures
the memory of the tiled loss alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from clip_ray.config import LossConfig
from clip_ray.config_file import load_config
from clip_ray.loss.contrastive import contrastive_loss
from clip_ray.loss.reference import info_nce_reference

DIM, CASE_TIMEOUT_S = 512, 1200
TOWER_BATCH = {"cpu": 8, "cuda": 512}
OURS = ("gathered", "tiled", "ring")
PEERS = ("open_clip local", "open_clip default", "plain")
Step = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local", type=int, default=2048, help="pairs on each rank")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--large", type=int, default=8192, help="pairs for the tiled loss alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tile", type=int, help="of the logits; else the device's")
    parser.add_argument("--device", choices=TOWER_BATCH, default="cpu")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments)))
        return
    found = {case: run_case(case, arguments) for case in (*OURS, *PEERS, "towers")}
    large = vars(arguments) | {"local": arguments.large, "repeats": 1}
    found["tiled, large"] = run_case("tiled", argparse.Namespace(**large))
    towers_s = found.pop("towers")["step_s"] / TOWER_BATCH[arguments.device] * arguments.local
    tiled_s, gathered_s = found["tiled"]["step_s"], found["gathered"]["step_s"]
    print(f"{'loss':20}{'step_s':>10}{'peak_gb':>10}")
    for case, one in found.items():
        print(f"{case:20}{one['step_s']:10.3f}{one['peak_gb']:10.3f}")
    result = {
        "tiled_memory_gb": found["tiled, large"]["peak_gb"],
        "tiled_time_vs_gathered": tiled_s / gathered_s,
        "tiled_step_time_vs_gathered": (towers_s + tiled_s) / (towers_s + gathered_s),
        "tiled_time_vs_open_clip": tiled_s / found["open_clip local"]["step_s"],
    }
    for field, value in result.items():
        print(f"{field:30}{value:8.3f}")
    if arguments.json:
        print(json.dumps(result | {"towers_s": towers_s, "cases": found, **vars(arguments)}))


def run_case(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    options = ("local", "ranks", "repeats", "tile", "device")
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name)}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--case", case, *words],
        stdout=subprocess.PIPE, text=True, check=True, timeout=CASE_TIMEOUT_S,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{case}: {result}", file=sys.stderr, flush=True)
    return result


def measure(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The first step's peak, and the median time of those after it."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.ranks)
    if arguments.device == "cuda":
        torch.set_default_device("cuda")
    step_of(case, 64, arguments.tile)()  # what libraries hold for themselves
    step = step_of(case, arguments.local, arguments.tile)
    before_gb = held_gb()
    restart_peak()
    times_s = [timed(step)]
    peak_gb = peak_held_gb() - before_gb
    times_s += [timed(step) for _ in range(arguments.repeats - 1)]
    return {"step_s": statistics.median(times_s[1:] or times_s), "peak_gb": peak_gb}


def timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def held_gb() -> float:
    return torch.cuda.memory_allocated() / 1e9 if on_gpu() else status_gb("VmRSS")


def restart_peak() -> None:
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_held_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if on_gpu() else status_gb("VmHWM")


def status_gb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024 / 1e9


def step_of(case: str, local: int, tile: int | None) -> Step:
    """Forward and backward of a loss, its features made."""
    if case == "towers":
        return towers_step()
    torch.manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(local, DIM), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor([14.0], requires_grad=True)
    loss = loss_of(case, tile)

    def step() -> None:
        images.grad = texts.grad = scale.grad = None
        loss(images, texts, scale).backward()

    return step


def loss_of(case: str, tile: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if case in OURS:
        config = LossConfig.model_validate({"method": case, "tile": tile})
        return lambda images, texts, scale: contrastive_loss(
            images, texts, scale, None, None, config
        )
    if case == "plain":  # one process that holds the whole batch
        ranks = dist.get_world_size()
        return lambda images, texts, scale: info_nce_reference(
            images.repeat(ranks, 1), texts.repeat(ranks, 1), scale
        )
    from open_clip.loss import ClipLoss

    local = case == "open_clip local"
    loss: Any = ClipLoss(
        local_loss=local, gather_with_grad=local, rank=0, world_size=dist.get_world_size()
    )
    return loss


def towers_step() -> Step:
    """Forward and backward of ViT-B/32 and its text tower, without a loss of pairs."""
    from clip_ray.model.clip import CLIP

    overrides = ["model={preset: vit-b-32}", "train.global_batch=128"]
    shapes = Path(__file__).parents[2] / "jobs" / "configs" / "shapes.yaml"
    config = load_config(shapes, overrides)
    model = CLIP(config.model, 49408, config.loss)
    if on_gpu():
        model.bfloat16()
    batch = TOWER_BATCH[torch.get_default_device().type]
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8)
    token_ids = torch.randint(4, 49408, (batch, 77))
    token_lengths = torch.full((batch,), 77)

    def step() -> None:
        model.zero_grad()
        image_features, text_features, *_ = model(images, token_ids, token_lengths)
        assert image_features is not None
        assert text_features is not None
        (image_features * text_features).sum().backward()

    return step


if __name__ == "__main__":
    main()
