"""The gradient of a whole batch from forwards over its parts (GradCache: Gao et al. 2021).

All parts are encoded without a graph; the loss of all features gives the gradient of each; then
each part is encoded again, with the same random state, and takes its features' gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What the model returns: features of images and of texts, scale, bias.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


class RandomState:
    """The random state of a device, and of the CPU, as it was here."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Makes it the random state again."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def leaves_of(outputs: Sequence[Outputs]) -> Outputs:
    """The features of all parts together, with a gradient to come."""
    images, texts, scales, biases = zip(*outputs, strict=True)
    bias = None if biases[0] is None else biases[0].clone().requires_grad_()
    return (
        torch.cat(images).requires_grad_(),
        torch.cat(texts).requires_grad_(),
        scales[0].clone().requires_grad_(),
        bias,
    )


def surrogate(outputs: Outputs, leaves: Outputs, number: int, parts: int) -> Tensor:
    """A loss of part `number` of `parts` equal ones, whose gradient is that part's share."""
    total = outputs[0].new_zeros(())
    for output, leaf in zip(outputs[:2], leaves[:2], strict=True):
        assert output is not None
        assert leaf is not None
        assert leaf.grad is not None
        total = total + (output * leaf.grad.chunk(parts)[number]).sum()
    for output, leaf in zip(outputs[2:], leaves[2:], strict=True):
        if output is not None and leaf is not None and leaf.grad is not None:
            total = total + (output * leaf.grad / parts).sum()
    return total
