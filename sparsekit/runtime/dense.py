"""A linear layer with a plain weight, multiplied by the streaming kernel where that is faster than torch.

torch re-lays a bf16 weight out at every call, which costs more than the product itself when there are only a few
tokens. What a packed checkpoint leaves dense, the output layer above all, would otherwise take longer than all that is
packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsekit.runtime import ops

if TYPE_CHECKING:
    from torch.nn import Module

FEW_TOKENS = 4
"""The kernel reads the weight once for up to four tokens; with more, torch's blocked products overtake it."""
_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})


class StreamingLinear(nn.Linear):
    """`nn.Linear` in everything but speed: the same parameters, state dict and results up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input W^T + b` for `input: [..., in]`."""
        return product(input, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` for `x: [..., in]` and `weight: [out, in]`, by the kernel for a few tokens, else by torch."""
    if x.numel() <= FEW_TOKENS * weight.shape[1] and _streams(x, weight):
        return ops.linear_dense(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def _streams(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel takes these; torch then multiplies or says what is wrong."""
    return (
        x.dtype == weight.dtype
        and x.dtype in _DTYPES
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def use_streaming(model: Module) -> int:
    """Make every plain `nn.Linear` of a model on the CPU a `StreamingLinear`, in place.

    Parameters, hooks and tied weights stay as they are. Subclasses of `nn.Linear` and layers on other devices or not
    loaded (meta) are left alone.

    Args:
        model: Any module.

    Returns:
        Number of layers changed.

    Raises:
        KernelsMissing: There are no kernels.
    """
    ops.register()
    found = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    for module in found:
        module.__class__ = StreamingLinear
    return len(found)
