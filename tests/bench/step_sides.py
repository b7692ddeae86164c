"""One side of the step's bench, in processes of its own: python step_sides.py SIDE OPTIONS.

Every side trains the same two towers (a timm ViT, a BERT of transformers), on CPUs with two workers
of one thread each, and ends with one JSON object: the samples/s of each measured step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photos import caption, photos
from stream_sides import tar_urls

from clip_ray.config import Config
from clip_ray.config_file import load_config, shipped
from clip_ray.data.tokenizer import make_tokenizer
from clip_ray.storage import Storage

LENGTH, VOCABULARY = 77, 49408
DECODED = 300
# Times its steps that the stream goes on, so that its readers work to the end.
STEPS_BEYOND = 2


@dataclass(frozen=True)
class Towers:
    """The same on every side, with the steps that are trained and the first that is measured.

    `readers` decode, for each worker, or are open_clip's loader processes.
    """

    size: int
    image: dict[str, Any]
    text: dict[str, Any]
    embed_dim: int
    local_batch: int
    steps: int
    first: int
    workers: int = 2
    gpus: int = 0
    readers: int = 1


# In a run's first steps its readers fill what they have room for.
LARGE = Towers(
    size=224,
    image={"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12},
    text={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
          "num_attention_heads": 8},
    embed_dim=512, local_batch=48, steps=6, first=3,
)  # fmt: skip
TOWERS = {
    "large": LARGE,
    "gpu": replace(LARGE, local_batch=1024, steps=30, first=10, workers=1, gpus=1, readers=12),
    # The readers begin some 40 steps ahead, which is not what lasts.
    "tiny": Towers(
        size=112,
        image={"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 1},
        text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 1},
        embed_dim=32, local_batch=64, steps=100, first=50,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--towers", choices=TOWERS, default="tiny")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--root", required=True)
    parser.add_argument("--raw", required=True)
    arguments = parser.parse_args()
    print(json.dumps(SIDES[arguments.side](arguments)))


def bench_config(arguments: argparse.Namespace) -> Config:
    towers = TOWERS[arguments.towers]
    fields = {
        "model.preset": "null",
        "model.embed_dim": towers.embed_dim,
        "model.image.timm_name": "vit_base_patch32_224",
        "model.image.size": towers.size,
        **{f"model.image.kwargs.{name}": value for name, value in towers.image.items()},
        "model.text.model_type": "bert",
        **{f"model.text.kwargs.{name}": value for name, value in towers.text.items()},
        "model.text.kwargs.vocab_size": VOCABULARY,
        "model.text.pooling": "mean",
        "model.text.context_length": LENGTH,
        "train.global_batch": towers.workers * towers.local_batch,
        "train.zero_stage": arguments.stage,
        "train.epochs": 1,
        "cluster.num_workers": towers.workers,
        "cluster.gpus_per_worker": towers.gpus,
        "cluster.readers_per_worker": towers.readers,
        "logging.every_steps": min(10, towers.first),
        "data.source": arguments.raw,
        "data.layout": "jsonl",
        "data.shorter_side": "null",
        "data.zero_shot_source": "null",
        "data.cache_dir": f"{tempfile.gettempdir()}/clip-ray-bench",
        "storage.root": arguments.root,
        "name": f"{arguments.towers}-{arguments.stage}-{os.getpid()}",
    }
    overrides = [f"{name}={value}" for name, value in fields.items()]
    return load_config(shipped("jobs/configs/shapes.yaml"), overrides)


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """The raw folder to shards, before anything is measured."""
    from clip_ray.pipeline import prepare_data, session

    config = bench_config(arguments)
    with session(config, lambda line: None):
        prepare_data(config, lambda line: None)
    return {}


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole harness over its stream, without the checkpoint at the end."""
    return harness(arguments, quiet_worker)


def memory_fed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The harness, its batches from memory."""
    return harness(arguments, memory_worker)


def harness(arguments: argparse.Namespace, worker: Any) -> dict[str, Any]:
    """`communication_share` is rank 0's, its wait for the other rank included; `transfer_share`
    that of the slower rank, which waits for none.
    """
    from clip_ray.pipeline import session
    from clip_ray.training import launch

    launch.train_worker = worker
    config = bench_config(arguments)
    with session(config, lambda line: None):
        launch.train(config, lambda line: None)
    logs = Storage(config.run_root).read_json("bench.json")
    measured = [entry for entry in logs[0] if entry["step"] > TOWERS[arguments.towers].first]
    return {
        "rates": [entry["images_per_s"] for entry in measured],
        "communication_share": max(entry["communication_share"] for entry in measured),
        "transfer_share": min(log[-1]["communication_share"] for log in logs),
        "data_wait_share": float(np.mean([entry["data_wait_share"] for entry in measured])),
        "mfu": float(np.mean([entry["mfu"] for entry in measured])),
    }


def quiet_worker(loop_config: dict[str, Any], memory: bool = False) -> None:
    """A worker as ever that stops after the bench's steps; the ranks' logs are all it leaves."""
    from clip_ray.collectives import all_gather_objects, rank
    from clip_ray.training import loop, worker

    steps = TOWERS[loop_config["config"]["name"].split("-")[0]].steps

    class Trainer(loop.Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.total_steps = steps
            context: Any = self.context
            saver: Any = self.saver
            stream = context.micro_batches
            context.micro_batches = lambda some: (
                memory_batches(self.config) if memory else stream(range(STEPS_BEYOND * steps))
            )
            saver.save = lambda *arguments: None

        def train(self) -> None:
            super().train()
            logs = all_gather_objects(self.log)
            if rank() == 0:
                Storage(self.config.run_root).write_json("bench.json", logs)

        def _validate(self) -> dict[str, float]:
            return {}

    loop.Trainer = Trainer
    worker.train_worker(loop_config)


def memory_worker(loop_config: dict[str, Any]) -> None:
    quiet_worker(loop_config, memory=True)


def memory_batches(config: Config) -> Iterator[dict[str, np.ndarray]]:
    """The same random batch for ever, its texts as long as captions with their two ends."""
    rng = np.random.default_rng(0)
    batch, size = config.local_batch, config.model.image.size
    lengths = [[len(caption(number).split()) + 2] for number in range(batch)]
    arrays = {
        "images": rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8),
        "token_ids": rng.integers(4, 400, (batch, 1, LENGTH), dtype=np.int32),
        "token_lengths": np.array(lengths, dtype=np.int32),
    }
    while True:
        yield arrays


def bare(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same engine, stage and batch in a plain loop, fed from memory, without Ray."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from process_group import run_on_gpu, run_ranks

    towers = TOWERS[arguments.towers]
    found = (
        [run_on_gpu(bare_rank, arguments)]
        if towers.gpus
        else run_ranks(towers.workers, bare_rank, arguments)
    )
    rates, cpu_s = zip(*found, strict=True)
    return {"rates": rates[0], "cpu_s_per_sample": sum(cpu_s)}


def bare_rank(arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Samples/s of each measured step, and CPU seconds of this rank for each sample of all."""
    from clip_ray.model.clip import CLIP
    from clip_ray.model.towers import without_padding
    from clip_ray.training.engine import Engine

    config = bench_config(arguments)
    tokenizer = make_tokenizer(config.model.text, [caption(0)])
    engine = Engine(CLIP(config.model, tokenizer.vocab_size, config.loss), config)
    batch = {name: torch.from_numpy(a) for name, a in next(memory_batches(config)).items()}
    batch["token_ids"] = without_padding(batch["token_ids"], batch["token_lengths"])
    batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
    steps, first = TOWERS[arguments.towers].steps, TOWERS[arguments.towers].first
    rates, cpu_from_s = [], 0.0
    for step in range(steps):
        if step == first:
            cpu_from_s = time.process_time()
        started_s = time.perf_counter()
        engine.train_step(batch, lr=1e-4)
        rates.append(config.train.global_batch / (time.perf_counter() - started_s))
    samples = (steps - first) * config.train.global_batch
    return rates[first:], (time.process_time() - cpu_from_s) / samples


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of one process to decode and crop a photograph."""
    from stream_sides import decode_all

    from clip_ray.data.transforms import random_resized_crop

    jpegs = list(photos(DECODED))
    decode_all(jpegs[:1], 1, random_resized_crop)  # imports
    started_s = time.process_time()
    decode_all(jpegs, 1, random_resized_crop, TOWERS[arguments.towers].size)
    return {"cpu_s_per_sample": (time.process_time() - started_s) / DECODED}


def open_clip(arguments: argparse.Namespace) -> dict[str, Any]:
    """open_clip's own training program under torchrun, with the same towers and images."""
    workers = TOWERS[arguments.towers].workers
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={workers}",
        "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
        str(Path(__file__).resolve()), "open_clip_rank", "--towers", arguments.towers,
        "--root", arguments.root, "--raw", arguments.raw,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # it writes logs even where it is told none
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    rates = re.findall(r"Batch \(t\): [\d.]+, ([\d.e+]+)/s", done.stderr + done.stdout)
    if done.returncode or not rates:
        raise SystemExit(done.stderr[-3000:])
    return {"rates": [float(rate) for rate in rates][TOWERS[arguments.towers].first :]}


def open_clip_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """What torchrun starts. On a CPU, its program passes DDP a device id, which DDP refuses."""
    import timm
    from open_clip.factory import add_model_config
    from open_clip_train.main import main as train
    from timm.models import register_model
    from transformers import BertConfig, BertModel

    towers = TOWERS[arguments.towers]

    def bench_vit(**kwargs: Any) -> torch.nn.Module:
        options: dict[str, Any] = {"img_size": towers.size}
        options.update(towers.image)
        options.update(kwargs)
        return timm.create_model("vit_base_patch32_224", **options)

    bench_vit.__module__ = "timm.models.vision_transformer"
    register_model(bench_vit)

    class DataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
            super().__init__(module, **kwargs)

    torch.nn.parallel.DistributedDataParallel = DataParallel  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        # It reads weights even where the config says that there are none.
        BertModel(BertConfig(vocab_size=VOCABULARY, **towers.text)).save_pretrained(
            f"{folder}/bert"
        )
        model = {
            "embed_dim": towers.embed_dim,
            "vision_cfg": {"timm_model_name": "bench_vit", "timm_pool": "token",
                           "timm_proj": "linear", "image_size": towers.size},
            "text_cfg": {"hf_model_name": f"{folder}/bert",
                         "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler",
                         "context_length": LENGTH, "vocab_size": VOCABULARY},
        }  # fmt: skip
        Path(folder, "bench.json").write_text(json.dumps(model))
        add_model_config(Path(folder, "bench.json"))
        urls = [f"pipe:curl -s -f '{url}'" for url in tar_urls(arguments.root)]
        samples = towers.steps * towers.workers * towers.local_batch
        device = ["--device", "cpu", "--dist-backend", "gloo", "--precision", "fp32"]
        if towers.gpus:
            device = ["--device", "cuda", "--precision", "amp_bf16", "--dataset-resampled"]
        train(
            [
                "--model", "bench", *device, "--dataset-type", "webdataset",
                "--train-data", "::".join(urls), "--train-num-samples", str(samples),
                "--batch-size", str(towers.local_batch), "--workers", str(towers.readers),
                "--epochs", "1",
                "--local-loss", "--gather-with-grad", "--log-every-n-steps", "1",
                "--logs", "none", "--warmup", "10", "--lr", "1e-4",
            ]
        )  # fmt: skip
    return {}


SIDES = {
    "prepare": prepare,
    "ours": ours,
    "memory_fed": memory_fed,
    "bare": bare,
    "decode": decode,
    "open_clip": open_clip,
    "open_clip_rank": open_clip_rank,
}

if __name__ == "__main__":
    main()
