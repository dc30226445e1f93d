"""The parameters of a model whose residual stream lies in other bases.

A norm's scales move into what reads it (W diag(g)), and so do its shifts, where a reader has a bias (b + W s). What is
left divides by the length of its input, which no rotation changes: readers become W diag(g) B / scale, writers
scale C^T W, embeddings E C scale. What reads a shift without having a bias gets it from the one direction that a norm
which subtracts the mean leaves empty: the norm's new shift is 1 everywhere, and W s / width is added to every column.

Biases are those of linears whose parameters are loaded. Matrices are turned in parts, in float32 where they are stored
in half precision, else in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.lazy import torch
from sparsekit.models.residual import Branch, Matrix, Residual
from sparsekit.solve.rotation import Basis, shortcut

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 8192  # of a matrix that are turned at once


@dataclass(frozen=True)
class Rotation:
    """A basis for every place of a residual stream; None leaves the stream there as it is.

    Attributes:
        residual: The stream.
        bases: One for each place.
        prefixes: Dotted names of the blocks.
        shortcuts: The stream is carried from basis to basis by a matrix at each sum; else all bases are the same.
        embedding: What embeddings are multiplied by besides, to make up for a scale that the model derives from its
            width.
    """

    residual: Residual
    bases: Sequence[Basis | None]
    prefixes: Sequence[str]
    shortcuts: bool
    embedding: float = 1.0

    def of_block(self, model: Any, block: int) -> dict[str, Tensor]:
        """Return the new parameters of a block, and its shortcuts, by name.

        Args:
            model: A transformers model in which the block is loaded.
            block: Its number.
        """
        found: dict[str, Tensor] = {}
        for k, (number, place) in enumerate(self.residual.of_block(block)):
            here, behind = self.bases[number], self.bases[number + 1]
            for branch in place.branches:
                found |= self._reading(model, branch, here)
                for writer in branch.writers:
                    found |= _writing(model, writer, behind)
            if self.shortcuts:
                found[f"{self.prefixes[block]}.shortcuts.{k}.weight"] = shortcut(here, behind)
        return found

    def outside(self, model: Any) -> dict[str, Tensor]:
        """Return the new parameters outside the blocks; the head is among them, for it is tied no longer.

        Args:
            model: A transformers model in which all outside the blocks is loaded.
        """
        (_, place), first = self.residual.of_block(None)[0], self.bases[0]
        (branch,), head = place.branches, f"{self.residual.head}.weight"
        found: dict[str, Tensor] = {head: model.get_parameter(head).data}
        if self.bases[-1] is not None:
            found |= self._reading(model, branch, self.bases[-1])
        if first is not None:
            for matrix in self.residual.embeddings:
                weight = model.get_parameter(matrix.name).data
                found[matrix.name] = turned(weight, matrix.axis, first.columns * (first.scale * self.embedding))
        return found

    def _reading(self, model: Any, branch: Branch, basis: Basis | None) -> dict[str, Tensor]:
        """Return a norm that does not scale, and its readers with the norm's scales in them."""
        if basis is None:
            return {}
        norm = model.get_submodule(branch.norm)
        one = self.residual.norm.endswith("plus_one")
        scales = norm.weight.data.to(torch.float64) + one
        shifts = norm.bias.data.to(torch.float64) if getattr(norm, "bias", None) is not None else None
        found = {f"{branch.norm}.weight": torch.full((basis.width,), 0.0 if one else 1.0, dtype=norm.weight.dtype)}
        by_mean = shifts is not None and any(reader.bias is None for reader in branch.readers)
        if shifts is not None:
            found[f"{branch.norm}.bias"] = torch.full((basis.width,), float(by_mean), dtype=norm.bias.dtype)
        into = scales[:, None] * basis.back / basis.scale
        for reader in branch.readers:
            weight = model.get_parameter(reader.name).data
            added = None
            if shifts is not None:
                shifted = turned(weight, reader.axis, shifts[:, None]).select(reader.axis, 0)
                if by_mean:
                    added = shifted / basis.width
                elif reader.bias is not None:
                    found[reader.bias] = model.get_parameter(reader.bias).data + shifted
            read = turned(weight, reader.axis, into)
            found[reader.name] = read if added is None else read + added.unsqueeze(reader.axis)
        return found


def _writing(model: Any, writer: Matrix, basis: Basis | None) -> dict[str, Tensor]:
    """Return what writes to the stream, as it writes to a narrower one."""
    if basis is None:
        return {}
    out = basis.columns * basis.scale
    found = {writer.name: turned(model.get_parameter(writer.name).data, writer.axis, out)}
    if writer.bias is not None:
        found[writer.bias] = turned(model.get_parameter(writer.bias).data, -1, out)
    return found


def turned(weight: Tensor, axis: int, by: Tensor) -> Tensor:
    """Return `weight` with an axis [hidden] multiplied by `by: [hidden, width]`, in the weight's dtype."""
    dtype = torch.float32 if weight.element_size() < 4 else torch.float64
    moved = weight.movedim(axis, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    by = by.to(dtype)
    parts = [(part.to(dtype) @ by).to(weight.dtype) for part in torch.split(rows, _ROWS)]
    return torch.cat(parts).reshape(*moved.shape[:-1], by.shape[1]).movedim(-1, axis).contiguous()
