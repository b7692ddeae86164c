"""The DeepSpeed engine: one optimizer step, and the fp32 state behind it, at any ZeRO stage.

The one file that knows DeepSpeed. State goes in and out by parameter name, in full and in fp32, so
that what is stored does not depend on world size or stage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from clip_ray.collectives import any_rank, rank, world_size
from clip_ray.config import Config
from clip_ray.loss.contrastive import contrastive_loss
from clip_ray.model.clip import CLIP
from clip_ray.training.cached import Outputs, RandomState, leaves_of, surrogate

INPUTS = ("images", "token_ids", "token_lengths")
MOMENTS = ("exp_avg", "exp_avg_sq")
# Where each of DeepSpeed's optimizers keeps the flat fp32 tensors that the inner AdamW updates.
_FLAT_GROUPS = (
    "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition",
)  # fmt: skip


@dataclass(frozen=True)
class StepResult:
    """What one step left behind: this rank's loss, exp(logit_scale) before it, gradient norm.

    `skipped`: some rank's loss was not finite, and no rank has stepped.
    """

    loss: Tensor
    scale: Tensor
    grad_norm: float = 0.0
    skipped: bool = False


class Engine:
    """A CLIP model under DeepSpeed. Every method must be called by every rank."""

    def __init__(self, model: CLIP, config: Config) -> None:
        logger.setLevel(logging.WARNING)
        self.max_logit_scale = math.log(config.loss.max_scale)
        self._loss_config = config.loss
        self._local_batch, self._micro_batch = config.local_batch, config.micro_batch
        model.recompute(config.train.recompute)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
        )
        # Any: DeepSpeed's classes do not declare what its engines have.
        initialised: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        self._engine, self._optimizer = initialised[:2]
        self.device = self._engine.device
        self._z3 = config.train.zero_stage == 3
        self._inner = getattr(self._optimizer, "optimizer", self._optimizer)
        self._unsharded = self._unsharded_masters() if config.train.zero_stage == 0 else {}

    @property
    def module(self) -> CLIP:
        """The model; under ZeRO-3 its parameters are whole only inside a forward."""
        return self._engine.module

    def train_step(self, batch: Mapping[str, Tensor], lr: float) -> StepResult:
        """One optimizer step on this rank's part of the global batch.

        images: [B, H, W, 3], token_ids: [B, k, L], token_lengths: [B, k], image_ids: [B] where an
        image may come twice. Larger parts than the micro batch go through the model in several
        forwards, with the gradient of one (GradCache). Raises ValueError where B is another than
        the config's: ranks with unequal parts would wait for each other.
        """
        if len(batch["images"]) != self._local_batch:
            raise ValueError(
                f"rank {rank()} has {len(batch['images'])} images: every rank must have "
                f"train.global_batch / cluster.num_workers = {self._local_batch}"
            )
        self._engine.train()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        image_ids, micro_batches = batch.get("image_ids"), self._micro_batches(batch)
        if len(micro_batches) == 1:
            outputs: Outputs = self._engine(**micro_batches[0])
            loss = self._loss(outputs, image_ids)
            states, leaves = [], outputs
        else:
            states, leaves = self._features_without_graph(micro_batches)
            loss = self._loss(leaves, image_ids)
        result = StepResult(loss.detach(), leaves[2].detach())
        if any_rank(~torch.isfinite(loss)):
            return replace(result, skipped=True)
        if states:
            loss.backward()
            self._backward_again(micro_batches, states, leaves)
        else:
            self._engine.backward(loss)
        self._engine.step()
        self.clamp_logit_scale()
        return replace(result, grad_norm=float(self._engine.get_global_grad_norm() or 0))

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
        master = self._master(parameter)
        if float(master) > self.max_logit_scale:
            self._set_master(parameter, torch.full_like(master, self.max_logit_scale))

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Every parameter in fp32 and every persistent buffer, on the CPU, by name."""
        tensors = {name: self._master(p).cpu().clone() for name, p in self._parameters()}
        return tensors | self._frozen() | self._buffers()

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """`param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` in fp32, `buffer/NAME`, on the CPU."""
        tensors: dict[str, Tensor] = {}
        self._link_moments()
        for name, parameter in self._parameters():
            tensors[f"param/{name}"] = self._master(parameter).cpu().clone()
            for key in MOMENTS:
                tensors[f"{key}/{name}"] = self._moment(parameter, key).cpu().clone()
        kept = self._frozen() | self._buffers()
        return tensors | {f"buffer/{name}": tensor for name, tensor in kept.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Takes what `state()` gave after `step` steps, at whatever world size and stage."""
        self._materialise_moments(step)
        for name, parameter in self._parameters():
            self._set_master(parameter, tensors[f"param/{name}"].to(self.device))
            for key in MOMENTS:
                self._set_moment(parameter, key, tensors[f"{key}/{name}"].to(self.device))
        buffers = dict(self.module.named_buffers())
        for name in self._buffers():
            buffers[name].copy_(tensors[f"buffer/{name}"])
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(tensors[f"buffer/{name}"])

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def _buffers(self) -> dict[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        persistent = self.module.state_dict().keys() - parameters.keys()
        buffers = dict(self.module.named_buffers())
        return {name: buffers[name].cpu().clone() for name in sorted(persistent)}

    def _frozen(self) -> dict[str, Tensor]:
        """The parameters that are not trained, in fp32, on the CPU."""
        found = {}
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = parameter.detach().float().cpu().clone()
        return found

    def _unsharded_masters(self) -> dict[nn.Parameter, Tensor]:
        """ZeRO-0: each parameter's fp32 master, which in fp32 is the parameter itself."""
        own = [p for _, p in self._parameters()]
        narrow = [p for group in getattr(self._optimizer, "fp16_groups", [own]) for p in group]
        wide = [p for group in getattr(self._optimizer, "fp32_groups", [own]) for p in group]
        # DeepSpeed's ZeRO-0 in bf16 has stepped once by now, with zero gradients, to make its
        # state: that counts a step and decays the weights. It is undone.
        self._inner.state.clear()
        for parameter, master in zip(narrow, wide, strict=True):
            master.data.copy_(parameter.data)
        return dict(zip(narrow, wide, strict=True))

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if self._unsharded:
            return self._unsharded[parameter].detach()
        master: Any = safe_get_full_fp32_param(parameter)
        return master.reshape(_shape(parameter))

    def _set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets the master, and what the next forward sees of it."""
        if self._z3:
            safe_set_local_fp32_param(parameter, _part(value, safe_get_local_fp32_param(parameter)))
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
            return
        if self._unsharded:
            self._unsharded[parameter].data.copy_(value)
        else:
            safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self._unsharded:
            return self._inner.state[self._unsharded[parameter]][key]
        moment: Any = safe_get_full_optimizer_state(parameter, key)
        return moment.reshape(_shape(parameter))

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._unsharded:
            self._moment(parameter, key).copy_(value)
        elif self._z3:
            mine = _part(value, safe_get_local_optimizer_state(parameter, key))
            safe_set_local_optimizer_state(parameter, mine, key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _materialise_moments(self, step: int) -> None:
        """AdamW makes its state at its first step; a restored one needs it before."""
        names = [name for name in _FLAT_GROUPS if hasattr(self._optimizer, name)]
        flats = getattr(self._optimizer, names[0]) if names else self._unsharded.values()
        for flat in flats:
            self._inner.state[flat] = {
                "step": torch.tensor(float(step)),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Ties each parameter to its moments once more.

        DeepSpeed does so after the first group's first step, when the other groups have none yet.
        """
        if hasattr(self._optimizer, "_hp_optimizer_states_linked"):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, embeddings of one dimension and logit_scale do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON, derived; users never write it."""
    train, optim = config.train, config.optim
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
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _shape(parameter: nn.Parameter) -> torch.Size:
    # Under ZeRO-3 the parameter itself is empty between forwards.
    return getattr(parameter, "ds_shape", parameter.shape)


def _part(value: Tensor, local: Any) -> Tensor:
    """This rank's part of a full tensor, in the shape of `local`.

    The parts are equal, the last ones padded with zeros; DeepSpeed's own setter forgets that.
    """
    padded = torch.zeros(local.numel() * world_size(), dtype=local.dtype, device=local.device)
    padded[: value.numel()] = value.flatten()
    return padded.chunk(world_size())[rank()].reshape(local.shape)
