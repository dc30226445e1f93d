"""Which layers of a loaded model multiply packed, and with what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsekit.runtime import buffers, gates, native
from sparsekit.runtime.modules import SparseLinear


@dataclass(frozen=True)
class Runtime:
    """What multiplies in a loaded model.

    Attributes:
        packed: Linear layers that multiply with packed weights.
        linears: All linear layers.
        isa: Instruction set of the kernels; None without a packed layer.
        signals: Signals that are thinned out.
        skipping: Those whose products skip what is dropped; the others multiply it as zeros.
    """

    packed: int
    linears: int
    isa: str | None
    signals: int = 0
    skipping: int = 0

    def __str__(self) -> str:
        """Return it in a few words."""
        weights = f"{self.packed} of {self.linears} linears packed, {self.isa}"
        if not self.packed:
            weights = f"dense, {self.linears} linears in torch"
        if not self.signals:
            return weights
        return f"{weights}, {self.signals} signals thinned out, {self.skipping} of them skipped by kernels"


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every layer that is one product with a weight matrix."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, SparseLinear | nn.Linear | Conv1D):
            yield name, module


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer of `linears` as [out, in], contiguous; packed ones are unpacked."""
    if isinstance(module, SparseLinear) and module.packed is not None:
        return buffers.unpack(module.packed).to(module.dtype)
    weight: Any = module.weight
    stored: Tensor = weight.detach()
    return stored.contiguous() if isinstance(module, nn.Linear) else stored.T.contiguous()


def describe_runtime(model: nn.Module) -> Runtime:
    """Count a model's layers by what they multiply with, and its gates."""
    found = [isinstance(module, SparseLinear) for _, module in linears(model)]
    isa = native.isa() if any(found) else None
    thinned = gates.describe(model)
    if thinned is None:
        return Runtime(sum(found), len(found), isa)
    return Runtime(sum(found), len(found), isa, len(thinned.file.gates), len(thinned.kernels))
