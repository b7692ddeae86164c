"""The DeepSpeed engine: one optimizer step at any ZeRO stage and precision.

With masters.py, which holds the fp32 state behind it, the only file that knows DeepSpeed.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from deepspeed.utils import logger
from torch import Tensor, nn

from clip_ray.collectives import rank, votes_of_ranks
from clip_ray.config import Config, OptimConfig
from clip_ray.loss.contrastive import contrastive_loss
from clip_ray.model.clip import CLIP
from clip_ray.model.groups import learning_rate_factors
from clip_ray.training.cached import Outputs, RandomState, leaves_of, surrogate
from clip_ray.training.hardware import Precision, resolve_precision
from clip_ray.training.masters import Masters

INPUTS = ("images", "token_ids", "token_lengths")
# The first loss scale in fp16 is two to this power; it halves and doubles from there.
FP16_SCALE_POWER = 16
Votes = Callable[[], Sequence[int]]


@dataclass(frozen=True)
class StepResult:
    """What one step left behind: this rank's loss, exp(logit_scale) before it, gradient norm.

    `skipped`: some rank's loss was not finite, or a gradient in fp16, and no rank has stepped.
    `voted`: the largest of the ranks' votes, each by itself.
    """

    loss: Tensor
    scale: Tensor
    grad_norm: float = 0.0
    skipped: bool = False
    voted: list[int] = field(default_factory=list)


class Engine:
    """A CLIP model under DeepSpeed; `masters` is the state behind it, `precision` its forward's.

    Every method must be called by every rank.
    """

    def __init__(self, model: CLIP, config: Config) -> None:
        logger.setLevel(logging.WARNING)
        self.max_logit_scale = math.log(config.loss.max_scale)
        self.precision: Precision = resolve_precision(config.train.precision)
        if self.precision == "fp32":
            # PyTorch's convolutions round to TF32 on their own, its matrix products do not.
            torch.backends.cudnn.allow_tf32 = False
        if self.precision == "fp16":
            _allow_fp16_on_any_cpu()
        self._loss_config = config.loss
        self._local_batch, self._micro_batch = config.local_batch, config.micro_batch
        model.recompute(config.train.recompute)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optim),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,  # in one pass over memory: a quarter of the time, on a CPU too
        )
        _import_muon_uncompiled()
        # Else DeepSpeed compiles, for half a minute, an all-reduce that only inference has.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
        # Any: DeepSpeed's classes do not declare what its engines have.
        initialised: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        self._engine, self._optimizer = initialised[:2]
        self.device = self._engine.device
        train = config.train
        self.masters = Masters(self.module, self._optimizer, train.zero_stage, train.ema_decay)
        if train.compile:
            model.compile_towers()

    @property
    def module(self) -> CLIP:
        """The model; under ZeRO-3 its parameters are whole only inside a forward."""
        return self._engine.module

    def train_step(
        self, batch: Mapping[str, Tensor], lr: float, votes: Votes = lambda: ()
    ) -> StepResult:
        """One optimizer step on this rank's part of the global batch.

        images: [B, H, W, 3], token_ids: [B, k, L], token_lengths: [B, k], image_ids: [B] where an
        image may come twice. Larger parts than the micro batch go through the model in several
        forwards, with the gradient of one (GradCache). `votes`, called in the middle of the step:
        what the ranks are to agree on besides. Raises ValueError where B is another than the
        config's: ranks with unequal parts would wait for each other.
        """
        if len(batch["images"]) != self._local_batch:
            raise ValueError(
                f"rank {rank()} has {len(batch['images'])} images: every rank must have "
                f"train.global_batch / cluster.num_workers = {self._local_batch}"
            )
        self._engine.train()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        result = self._forward_and_backward(batch, votes)
        if not result.skipped:
            self._engine.step()
            overflow = bool(getattr(self._optimizer, "overflow", False))
            norm = 0.0 if overflow else float(self._engine.get_global_grad_norm() or 0)
            result = replace(result, skipped=overflow, grad_norm=norm)
        self.clamp_logit_scale()
        if not result.skipped:
            self.masters.update_average()
        return result

    def _forward_and_backward(self, batch: Mapping[str, Tensor], votes: Votes) -> StepResult:
        image_ids, micro_batches = batch.get("image_ids"), self._micro_batches(batch)
        if len(micro_batches) == 1:
            outputs: Outputs = self._engine(**micro_batches[0])
            loss = self._loss(outputs, image_ids)
            states, leaves = [], outputs
        else:
            states, leaves = self._features_without_graph(micro_batches)
            loss = self._loss(leaves, image_ids)
        skipped, voted = votes_of_ranks(~torch.isfinite(loss), votes())
        result = StepResult(loss.detach(), leaves[2].detach(), skipped=skipped, voted=voted)
        if skipped:
            return result
        if states:
            loss.backward()
            self._backward_again(micro_batches, states, leaves)
        else:
            self._engine.backward(loss)
        return result

    def _loss(self, outputs: Outputs, image_ids: Tensor | None) -> Tensor:
        images, texts, scale, bias = outputs
        return contrastive_loss(images, texts, scale, bias, image_ids, self._loss_config)

    def _micro_batches(self, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        parts = {name: batch[name].split(self._micro_batch) for name in INPUTS}
        return [
            {
                "images": images,
                "token_ids": token_ids.flatten(0, 1),
                "token_lengths": token_lengths.flatten(),
            }
            for images, token_ids, token_lengths in zip(*parts.values(), strict=True)
        ]

    @torch.no_grad()
    def _features_without_graph(
        self, micro_batches: list[dict[str, Tensor]]
    ) -> tuple[list[RandomState], Outputs]:
        """All outputs of the model as leaves, and the random state before each forward."""
        states, outputs = [], []
        for micro_batch in micro_batches:
            states.append(RandomState(self.device))
            outputs.append(self._engine(**micro_batch))
        return states, leaves_of(outputs)

    def _backward_again(
        self, micro_batches: list[dict[str, Tensor]], states: list[RandomState], leaves: Outputs
    ) -> None:
        """Each forward once more, with a graph, and its share of the loss's gradient."""
        for number, (micro_batch, state) in enumerate(zip(micro_batches, states, strict=True)):
            last = number == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(last)
            state.restore()
            outputs = self._engine(**micro_batch)
            self._engine.backward(surrogate(outputs, leaves, number, len(micro_batches)))

    @torch.no_grad()
    def encode(self, **inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Features of images or texts (CLIP.forward's arguments), without gradients."""
        self._engine.eval()
        images, texts, *_ = self._engine(**{k: v.to(self.device) for k, v in inputs.items()})
        return images, texts

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bounds logit_scale on the fp32 master: on the model's copy alone it would be undone."""
        parameter = self.module.logit_scale
        if not parameter.requires_grad:
            return
        master = self.masters.get(parameter)
        if float(master) > self.max_logit_scale:
            self.masters.set(parameter, torch.full_like(master, self.max_logit_scale))


def parameter_groups(model: CLIP, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups by weight decay and learning-rate factor; freezes what has the factor 0.

    Matrices decay; norms, biases, embeddings of one dimension and logit_scale do not.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    factors = learning_rate_factors(model, optim)
    for name, parameter in model.named_parameters():
        if factors[name] == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            decay = optim.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((decay, factors[name]), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON, derived; users never write it."""
    train, optim = config.train, config.optim
    precision = resolve_precision(train.precision)
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {
            "enabled": precision == "fp16",
            "initial_scale_power": FP16_SCALE_POWER,
            "hysteresis": 1,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _import_muon_uncompiled() -> None:
    """DeepSpeed imports this optimizer with any, and TorchInductor for it: two seconds."""
    with patch.object(compiler, "compile", return_value=compiler.dummy_decorator):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def _allow_fp16_on_any_cpu() -> None:
    """torch computes in fp16 on every CPU, if slowly; DeepSpeed wants one that is fast at it."""
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True
