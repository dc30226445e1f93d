"""Gated layers whose products skip what a gate drops, for the few tokens of a decoding step.

A plain layer's weight is stored column by column instead of row by row: the same parameter with other strides, no
second copy. A packed layer gets its weight by columns beside the one by rows, which products of many tokens go on with.
An MLP's gate says which rows of `up` are wanted before they are computed, and its zeros which columns of `down`.

Skipping wants a share that pays. Signals that lose less stay as they are, and their zeros are multiplied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsekit.models.gate_files import GateFile
from sparsekit.models.gates import Gated, Placed, Scope, Threshold
from sparsekit.models.sites import Place, gate_places
from sparsekit.models.structure import find_stack
from sparsekit.runtime import buffers, native
from sparsekit.runtime.column_ops import (
    FEW_TOKENS,
    column_major,
    linear_columns,
    linear_columns_packed,
    linear_rows,
    pack_columns,
)
from sparsekit.runtime.modules import SparseLinear

LEAST_SHARE = 0.1
"""Of a signal left out, from which on skipping is no slower than multiplying: see docs/results.md."""
_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
_APART = 1.2
"""How much longer a byte takes to read of columns that do not follow each other (scripts/bench/activation_kernels)."""
_NOTHING = torch.zeros(1)
"""A threshold that passes over exact zeros only."""


@dataclass(frozen=True)
class Skipping:
    """A forward that skips, of a module that a signal belongs to.

    Attributes:
        signal: Name of the signal.
        module: Whose forward it is.
        forward: The forward.
    """

    signal: str
    module: nn.Module
    forward: Callable[..., Tensor]


class GatedColumns(Gated):
    """The forward of a linear with a gate at its input, for a weight stored column by column."""

    def __init__(self, module: nn.Module, placed: Placed, scope: Scope, packed: Tensor | None = None) -> None:
        """Take the place of the module's forward; `packed` is its weight by columns, None: its own is."""
        super().__init__(module, placed, scope)
        self.module: Any = module
        self.packed = packed
        width: Any = module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features
        self.width = int(width)
        self.threshold = placed.gate.t if isinstance(placed.gate, Threshold) else _NOTHING

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer; a few tokens that are all thinned out read only the columns that count."""
        scope, placed = self.scope, self.placed
        if scope.off or scope.dense or not _fits(x, self.width):
            return super().__call__(x, *args, **kwargs)
        if isinstance(placed.gate, Threshold) and placed.remainder is None:
            return self.product(x, self.threshold)
        kept = placed.gate(x)
        y = self.product(kept, _NOTHING)
        if placed.remainder is not None:
            y = y + (x - kept) @ placed.remainder.right.T @ placed.remainder.left.T
        return y

    def product(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Return the product without the inputs that are not above their threshold."""
        module = self.module
        if self.packed is not None:
            return linear_columns_packed(x, self.packed, module.bias, threshold, module.out_features)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        return linear_columns(x, weight, module.bias, threshold)


class _Kept(threading.local):
    """What a gate has kept, until `up` asks for it: [..., neurons] bool."""

    def __init__(self) -> None:
        self.keep: Tensor | None = None


class GatedActivation(Gated):
    """The forward of an activation with a gate behind it, which tells `up` what is wanted of it."""

    def __init__(self, module: nn.Module, placed: Placed, scope: Scope, kept: _Kept) -> None:
        super().__init__(module, placed, scope)
        self.kept = kept

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the activation."""
        scope = self.scope
        if scope.off or scope.dense or not _fits(x, x.shape[-1]):
            return super().__call__(x, *args, **kwargs)
        g = self.inner(x, *args, **kwargs)
        self.kept.keep = keep = self.placed.gate.keep(g)
        return torch.where(keep, g, 0)


class KeptRows:
    """The forward of `up`: only the outputs that the gate beside it has kept, where it has just said so."""

    def __init__(self, module: nn.Module, kept: _Kept) -> None:
        self.module: Any = module
        self.inner: Callable[..., Tensor] = module.forward
        self.kept = kept

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer."""
        keep, self.kept.keep = self.kept.keep, None
        if keep is None or keep.shape[:-1] != x.shape[:-1]:
            return self.inner(x)
        return linear_rows(x, self.module.weight, self.module.bias, keep)


def skipping(model: Any, modules: Mapping[str, nn.Module], file: GateFile, scope: Scope) -> Iterator[Skipping]:
    """Yield the forwards of a model's modules that skip; signals that have none are left out.

    Args:
        model: The model.
        modules: Name of a signal -> the module it stands at. Weights that are to be skipped are stored anew.
        file: Their gates.
        scope: Shared by all.
    """
    mlps: dict[str, Place] | None = None
    for name, module in modules.items():
        placed, share = file.gates[name], file.shares.get(name, 1.0)
        if share < LEAST_SHARE:
            continue
        if placed.kind == "input":
            if (forward := _columns(module, placed, scope, share)) is not None:
                yield Skipping(name, module, forward)
            continue
        mlps = _mlps(model) if mlps is None else mlps
        if name in mlps:
            yield from _neurons(name, module, placed, scope, mlps[name], model)


def _columns(module: nn.Module, placed: Placed, scope: Scope, share: float) -> GatedColumns | None:
    """Return the forward of a linear that skips columns, None where it would read no less."""
    if isinstance(module, SparseLinear):
        rows = module.packed
        if rows is None or module.dtype != torch.bfloat16 or module.transposed:
            return None
        if not native.isa().startswith("avx512"):  # elsewhere packed columns are expanded value by value
            return None
        packed = pack_columns(buffers.unpack(rows).to(torch.bfloat16))
        pays = packed.numel() * (1 - share) * _APART < rows.numel()
        return GatedColumns(module, placed, scope, packed) if pays else None
    return GatedColumns(module, placed, scope) if _store_by_column(module) else None


def _neurons(name: str, module: nn.Module, placed: Placed, scope: Scope, mlp: Place, model: Any) -> Iterator[Skipping]:
    """Yield the forwards of an MLP whose gate is thinned out: the activation, `up`, `down`."""
    kept = _Kept()
    down = mlp.readers[0].module
    up = model.get_submodule(mlp.site.skips[0].name) if len(mlp.site.skips) == 2 else None
    yield Skipping(name, module, GatedActivation(module, placed, scope, kept))
    if isinstance(up, nn.Linear) and up.weight.dtype in _DTYPES and up.weight.is_contiguous():
        yield Skipping(name, up, KeptRows(up, kept))
    if _store_by_column(down):
        yield Skipping(name, down, GatedColumns(down, Placed("input", Threshold(_NOTHING)), scope))


def _mlps(model: Any) -> dict[str, Place]:
    """Return the MLPs whose gate is a module of its own, by its name; none where linears are packed."""
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        return {}
    stack = find_stack(model)
    found = [place for index in range(len(stack.blocks)) for place in gate_places(model, stack, index)]
    return {place.site.name: place for place in found}


def _store_by_column(module: Any) -> bool:
    """Store a plain layer's weight column by column; return whether it could be."""
    if isinstance(module, Conv1D):
        return bool(module.weight.device.type == "cpu" and module.weight.is_contiguous())
    if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu" or module.weight.dtype not in _DTYPES:
        return False
    module.weight.data = column_major(module.weight)
    return True


def _fits(x: Tensor, width: int) -> bool:
    """Return whether the kernels take these inputs of so many entries a token."""
    return x.numel() <= FEW_TOKENS * width and x.device.type == "cpu" and not torch.is_grad_enabled()
