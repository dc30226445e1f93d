"""Finding the decoder stack of any architecture by structure, with no per-family code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.errors import UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.linears import Linear, find_linears, routers

if TYPE_CHECKING:
    from torch import nn

SHORTCUTS = "shortcuts"
"""What a block calls the matrices that carry the residual stream past its branches; see `shortcuts.py`."""


@dataclass(frozen=True)
class Stack:
    """The decoder blocks of a model: `path` is the ModuleList's dotted name."""

    path: str
    blocks: tuple[nn.Module, ...]

    def prefix(self, index: int) -> str:
        """Dotted name of block `index`."""
        return f"{self.path}.{index}"

    def owner(self, parameter: str) -> int | None:
        """Return the block a parameter name belongs to, None for embeddings, final norm and head."""
        if not parameter.startswith(f"{self.path}."):
            return None
        return int(parameter[len(self.path) + 1 :].partition(".")[0])

    def linears(self, index: int) -> list[Linear]:
        """Return the linears of block `index`."""
        return find_linears(self.blocks[index], self.prefix(index), index)

    def matrix_weights(self) -> int:
        """Count the weights of all matrices in the blocks, presented as linears or not, but routers and shortcuts.

        This is the denominator of coverage: a matrix that find_linears cannot see shows as coverage below 1.
        """
        return sum(
            parameter.numel()
            for block in self.blocks
            for skipped in (routers(block),)
            for name, parameter in block.named_parameters()
            if parameter.ndim >= 2 and parameter.numel() > max(parameter.shape) and name not in skipped
            if not name.endswith("_bias")  # [experts, out] biases of fused experts
            if not name.startswith(f"{SHORTCUTS}.")
        )


def find_stack(model: nn.Module) -> Stack:
    """Return the outermost, largest ModuleList whose members hold linears.

    Raises:
        UnsupportedFamily: There is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) == 0:
            continue
        weights = sum(linear.info.numel for block in module for linear in find_linears(block, "", 0))
        # Strictly larger: of nested lists with equal content the outer one, seen first, wins.
        if weights and (best is None or weights > best[0]):
            best = (weights, path, module)
    if best is None:
        raise UnsupportedFamily(
            f"no stack of decoder blocks found in {type(model).__name__}",
            hint="sparsekit handles decoder-only models whose blocks stand in one ModuleList.",
        )
    return Stack(best[1], tuple(best[2]))


def inside_block(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the block that a module of a model is in, and its name there; None outside of blocks."""
    parts = name.split(".")
    for depth in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:depth])), torch.nn.ModuleList):
            return model.get_submodule(".".join(parts[: depth + 1])), ".".join(parts[depth + 1 :])
    return None
