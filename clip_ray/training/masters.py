"""The fp32 state behind an engine's parameters, at any ZeRO stage: by name, on the CPU.

Each rank gives the fragments that it holds; put together, they do not depend on world size or
stage. With engine.py, the only file that knows DeepSpeed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from clip_ray.collectives import rank, world_size
from clip_ray.training.loss_scale import LossScale

MOMENTS = ("exp_avg", "exp_avg_sq")
PARAMETER, AVERAGE = "param", "ema"
# Where each of DeepSpeed's optimizers keeps the flat fp32 tensors that the inner AdamW updates.
_FLAT_GROUPS = (
    "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition",
)  # fmt: skip


class Masters:
    """The fp32 weights, AdamW's moments, the loss scale and the weights' moving average.

    Every method must be called by every rank.
    """

    def __init__(
        self, module: nn.Module, optimizer: Any, zero_stage: int, ema_decay: float | None
    ) -> None:
        self._module, self._optimizer = module, optimizer
        self._z3 = zero_stage == 3
        self._inner = getattr(optimizer, "optimizer", optimizer)
        self._unsharded = self._unsharded_masters() if zero_stage == 0 else {}
        self._loss_scale = LossScale(optimizer)
        self._ema_decay = ema_decay
        self._averages = [flat.detach().clone() for flat in self._flats()] if ema_decay else []

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Every parameter in fp32 and every persistent buffer, by name."""
        tensors = {name: self.get(p).cpu().clone() for name, p in self._parameters()}
        return tensors | self._frozen() | self._buffers()

    @torch.no_grad()
    def fragments(self) -> dict[str, Tensor]:
        """This rank's share of the state, copied: no other rank is asked, but for frozen weights.

        Flattened fp32 pieces `param/NAME@OFFSET`, `exp_avg/…`, `exp_avg_sq/…` and, where there is
        a moving average, `ema/…`. Rank 0 adds, whole, what all ranks have: `buffer/NAME`, in fp16
        `scaler/FIELD`, and `optimizer/step`, the steps that were not skipped.
        """
        if not self._inner.state:  # no step so far, or none that was not skipped
            self._materialise_moments(torch.zeros(()))
        self._link_moments()
        found = {}
        for key in (PARAMETER, *MOMENTS):
            found |= self._pieces(key, None if key == PARAMETER else key)
        if self._averages:
            self._swap()
            found |= self._pieces(AVERAGE, None)
            self._swap()
        kept = self._frozen() | self._buffers()
        if rank() == 0:
            found["optimizer/step"] = self._steps().cpu().clone()
            found |= {f"buffer/{name}": tensor for name, tensor in kept.items()}
            found |= self._loss_scale.state()
        return found

    def _pieces(self, kind: str, moment: str | None) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._parameters():
            offset, piece = self._mine(parameter, moment)
            if len(piece):
                key = f"{kind}/{name}@{offset}"
                found[key] = piece.detach().to("cpu", torch.float32, copy=True)
        return found

    def _mine(self, parameter: nn.Parameter, moment: str | None) -> tuple[int, Tensor]:
        """Where in the flattened master, or in a moment of it, this rank's piece begins; and it."""
        if self._unsharded:
            whole = self.get(parameter) if moment is None else self._moment(parameter, moment)
            begin, end = self._even_share(whole.numel())
            return begin, whole.flatten()[begin:end]
        if self._z3:
            local: Any = (
                safe_get_local_fp32_param(parameter)
                if moment is None
                else safe_get_local_optimizer_state(parameter, moment)
            )
            offset = rank() * local.numel()
            return offset, local.flatten()[: max(0, _shape(parameter).numel() - offset)]
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return 0, parameter.new_empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)

    @staticmethod
    def _even_share(numel: int) -> tuple[int, int]:
        begin, end = (numel * place // world_size() for place in (rank(), rank() + 1))
        return begin, end

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes all ranks' fragments, put together, of whatever world size and stage.

        Where the average is new, it begins at these weights.
        """
        self._materialise_moments(tensors["optimizer/step"])
        if self._averages:
            for name, parameter in self._parameters():
                average = tensors.get(f"{AVERAGE}/{name}", tensors[f"{PARAMETER}/{name}"])
                self.set(parameter, _like(parameter, average))
            self._swap()
        for name, parameter in self._parameters():
            self.set(parameter, _like(parameter, tensors[f"{PARAMETER}/{name}"]))
            for key in MOMENTS:
                self._set_moment(parameter, key, _like(parameter, tensors[f"{key}/{name}"]))
        self._load_untrained(tensors)
        self._loss_scale.load(tensors)

    def get(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 master, whole."""
        if self._unsharded:
            return self._unsharded[parameter].detach()
        master: Any = safe_get_full_fp32_param(parameter)
        return master.reshape(_shape(parameter))

    def set(self, parameter: nn.Parameter, value: Tensor) -> None:
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

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the average towards the weights that a step has made, on each rank's shard.

        After n steps the decay has grown to (1 + n) / (10 + n), as TensorFlow's does, or to its
        full value: the average of a short run is not that of its start.
        """
        if self._ema_decay is None:
            return
        step = int(self._steps())
        decay = min(self._ema_decay, (1 + step) / (10 + step))
        for flat, average in zip(self._flats(), self._averages, strict=True):
            average.lerp_(flat.detach(), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Lets the model have its averaged weights, where there are such, in the block."""
        if not self._averages:
            yield
            return
        self._swap()
        self._show_masters()
        try:
            yield
        finally:
            self._swap()
            self._show_masters()

    @torch.no_grad()
    def _swap(self) -> None:
        for flat, average in zip(self._flats(), self._averages, strict=True):
            held = flat.detach().clone()
            flat.data.copy_(average)
            average.copy_(held)

    @torch.no_grad()
    def _show_masters(self) -> None:
        for _, parameter in self._parameters():
            self.set(parameter, self.get(parameter))

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that the inner AdamW updates: this rank's shard of all."""
        if self._unsharded:
            return list(self._unsharded.values())
        name = next(name for name in _FLAT_GROUPS if hasattr(self._optimizer, name))
        return list(getattr(self._optimizer, name))

    def _steps(self) -> Tensor:
        """Steps that AdamW has made: those that were not skipped."""
        return self._inner.state[self._flats()[0]]["step"]

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._module.named_parameters() if p.requires_grad)

    def _buffers(self) -> dict[str, Tensor]:
        parameters = dict(self._module.named_parameters())
        persistent = self._module.state_dict().keys() - parameters.keys()
        buffers = dict(self._module.named_buffers())
        return {name: buffers[name].cpu().clone() for name in sorted(persistent)}

    def _frozen(self) -> dict[str, Tensor]:
        """The parameters that are not trained, in fp32."""
        found = {}
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = parameter.detach().float().cpu().clone()
        return found

    def _load_untrained(self, tensors: Mapping[str, Tensor]) -> None:
        buffers = dict(self._module.named_buffers())
        for name in self._buffers():
            buffers[name].copy_(tensors[f"buffer/{name}"])
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(tensors[f"buffer/{name}"])

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

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """ZeRO-0: a moment, whole."""
        return self._inner.state[self._unsharded[parameter]][key]

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._unsharded:
            self._moment(parameter, key).copy_(value)
        elif self._z3:
            mine = _part(value, safe_get_local_optimizer_state(parameter, key))
            safe_set_local_optimizer_state(parameter, mine, key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _materialise_moments(self, step: Tensor) -> None:
        """AdamW makes its state at its first step; a restored one needs it before."""
        for flat in self._flats():
            self._inner.state[flat] = {
                "step": step.to(flat.device, copy=True),
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


def _shape(parameter: nn.Parameter) -> torch.Size:
    # Under ZeRO-3 the parameter itself is empty between forwards.
    return getattr(parameter, "ds_shape", parameter.shape)


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    return value.reshape(_shape(parameter)).to(parameter.device)


def _part(value: Tensor, local: Any) -> Tensor:
    """This rank's part of a full tensor, in the shape of `local`.

    The parts are equal, the last ones padded with zeros; DeepSpeed's own setter forgets that.
    """
    padded = torch.zeros(local.numel() * world_size(), dtype=local.dtype, device=local.device)
    padded[: value.numel()] = value.flatten()
    return padded.chunk(world_size())[rank()].reshape(local.shape)
