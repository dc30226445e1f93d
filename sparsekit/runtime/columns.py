"""Gated layers whose products skip what a gate drops, for the few tokens of a decoding step.

A layer's weight is stored column by column instead of row by row: the same parameter with other strides, no second
copy. Products of many tokens go on as they were. What is left dense of the model streams, see `dense`.

Skipping wants a share that pays. Signals that lose less stay as they are, and their zeros are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsekit.models.gate_files import GateFile
from sparsekit.models.gates import Gated, Placed, Scope, Threshold
from sparsekit.runtime.column_ops import FEW_TOKENS, column_major, linear_columns

LEAST_SHARE = 0.1
"""Of a signal left out, from which on skipping is no slower than multiplying: see docs/results.md."""
_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})


class GatedColumns(Gated):
    """The forward of a linear with a gate at its input, for a weight stored column by column."""

    def __init__(self, module: nn.Module, placed: Placed, scope: Scope) -> None:
        super().__init__(module, placed, scope)
        self.module: Any = module
        self.transposed = isinstance(module, Conv1D)
        self.threshold = placed.gate.t if isinstance(placed.gate, Threshold) else torch.zeros(1)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer; a few tokens that are all thinned out read only the columns that count."""
        scope, module = self.scope, self.module
        weight = module.weight.T if self.transposed else module.weight
        if scope.off or scope.dense or not _fits(x, weight):
            return super().__call__(x, *args, **kwargs)
        if isinstance(self.placed.gate, Threshold) and self.placed.remainder is None:
            return linear_columns(x, weight, module.bias, self.threshold)
        kept = self.placed.gate(x)  # its zeros are what a threshold of zero passes over
        y = linear_columns(kept, weight, module.bias, torch.zeros(1))
        if self.placed.remainder is not None:
            y = y + (x - kept) @ self.placed.remainder.right.T @ self.placed.remainder.left.T
        return y


def kernel_forwards(modules: Mapping[str, nn.Module], file: GateFile, scope: Scope) -> dict[str, Callable[..., Tensor]]:
    """Return name of a signal -> forward of its module that skips; those that have none are left out.

    Args:
        modules: Name of a signal -> the module it stands at. Weights that are to be skipped are stored anew.
        file: Their gates.
        scope: Shared by all.
    """
    found: dict[str, Callable[..., Tensor]] = {}
    for name, module in modules.items():
        placed = file.gates[name]
        if placed.kind == "input" and file.shares.get(name, 1.0) >= LEAST_SHARE and _store_by_column(module):
            found[name] = GatedColumns(module, placed, scope)
    return found


def _store_by_column(module: Any) -> bool:
    """Store a plain layer's weight column by column; return whether it could be."""
    if isinstance(module, Conv1D):
        return bool(module.weight.device.type == "cpu" and module.weight.is_contiguous())
    if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu" or module.weight.dtype not in _DTYPES:
        return False
    module.weight.data = column_major(module.weight)
    return True


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel takes these."""
    return (
        x.numel() <= FEW_TOKENS * weight.shape[1]
        and x.dtype == weight.dtype
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
    )
