"""Which layers of a loaded model multiply packed, and with what."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparsekit.runtime import native
from sparsekit.runtime.modules import SparseLinear


@dataclass(frozen=True)
class Runtime:
    """What multiplies in a loaded model.

    Attributes:
        packed: Linear layers that multiply with packed weights.
        linears: All linear layers.
        isa: Instruction set of the kernels; None without a packed layer.
    """

    packed: int
    linears: int
    isa: str | None

    def __str__(self) -> str:
        """Return it in a few words."""
        if not self.packed:
            return f"dense, {self.linears} linears in torch"
        return f"{self.packed} of {self.linears} linears packed, {self.isa}"


def describe_runtime(model: nn.Module) -> Runtime:
    """Count a model's layers by what they multiply with."""
    packed = sum(isinstance(module, SparseLinear) for module in model.modules())
    dense = sum(isinstance(module, nn.Linear) for module in model.modules())
    return Runtime(packed, packed + dense, native.isa() if packed else None)
