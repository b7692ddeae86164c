"""The dynamic loss scale of fp16: where DeepSpeed's optimizers keep it, as tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """That of an optimizer; empty where it scales no loss, or by a constant."""

    def __init__(self, optimizer: Any) -> None:
        # DeepSpeed has two kinds.
        scaler = getattr(optimizer, "loss_scaler", None) or getattr(
            optimizer, "loss_scale_config", None
        )
        dynamic = getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False))
        self._scaler: Any = scaler if dynamic else None

    def state(self) -> dict[str, Tensor]:
        """`scaler/FIELD`, each a number."""
        fields = {name: getattr(self._scaler, name, None) for name in _FIELDS}
        return {
            f"scaler/{name}": torch.tensor(value, dtype=torch.float64)
            for name, value in fields.items()
            if value is not None
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `state()` gave; what another precision did not have stays."""
        for key in self.state().keys() & tensors.keys():
            name = key.removeprefix("scaler/")
            kind = float if name == "cur_scale" else int
            setattr(self._scaler, name, kind(tensors[key]))
