"""Rotation: the residual stream turned so that the columns of its readers are orthogonal, nothing cut.

What it does: every place where the stream is read gets a basis: the right singular vectors of the key projection in
    front of an attention, of the gate projection in front of an MLP (`up` without a gate), with the norm's scales in
    them. Their columns then are orthogonal, which is what makes a choice of inputs by size times column norm the best
    one (`wina`). The model computes what it did before.
Source: Chen et al. 2025, "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference",
    arXiv 2505.19427: section 3.3 and algorithm 1; turning a residual stream: SliceGPT, arXiv 2401.15024.
Shapes: W diag(g) [out, hidden] = U S V^T -> readers W diag(g) V; a shortcut [hidden, hidden] at each sum.
Cost: an eigendecomposition of hidden^3 per place, once. When the model runs, two products of hidden x hidden per block
    carry the stream from basis to basis: 2 hidden^2 weights more for each token and in memory, none of which activation
    sparsity skips (19 % of a block's weights in SmolLM2-135M, 17 % in Llama-2-7B); and a head that was tied is stored
    on its own.
Deviations: norms are not turned into others. Where the leading projection has fewer rows than columns, the directions
    that it does not see are those of all readers of the place. Fused projections are one. `readers: all` stacks all
    readers of a place instead; experts always are stacked. Norms that subtract the mean are refused: the direction of
    the mean cannot be turned into others, so columns would not be orthogonal.
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sparsekit import ranks
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.contracts import Anatomy, MethodOptions, ReshapeContext, Reshaped, Reshaper
from sparsekit.errors import PlanError, UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.residual import Branch, Residual, residual
from sparsekit.models.roles import family
from sparsekit.models.slicing import untied
from sparsekit.models.structure import find_stack
from sparsekit.solve.rotate import Rotation
from sparsekit.solve.rotation import principal_basis
from sparsekit.solve.stream_bases import BasisFiles

if TYPE_CHECKING:
    from torch import Tensor, nn

_OTHERS = 1e-9
"""Weight of the readers that do not lead: it orders the directions that those which do cannot see."""


class RotateOptions(MethodOptions):
    """Options of `rotate`."""

    readers: Literal["leading", "all"] = Field(
        default="leading", description="leading: bases of key and gate projections; all: of all readers of a place"
    )


class Rotate(Reshaper[RotateOptions]):
    """Turn the residual stream at every place where it is read."""

    options_type = RotateOptions
    sums_of = "stream"

    @property
    def grows(self) -> bool:
        """It is meant to: the shortcuts are what it costs."""
        return True

    def check(self, anatomy: Anatomy) -> None:
        """Refuse families whose stream cannot be turned, or not so that columns become orthogonal."""
        _stream(anatomy)

    def outline(self, anatomy: Anatomy) -> Reshaped:
        """The shapes are those of a stream that is nowhere cut."""
        stream, hidden = _stream(anatomy), int(anatomy.model.config.hidden_size)
        config, shapes = untied([hidden] * len(stream.places), shortcuts=True, shapes=anatomy.shapes)
        return Reshaped(tuple(range(anatomy.blocks)), config, shapes)

    def plan(self, context: ReshapeContext) -> dict[str, JSON]:
        """Find the bases and write each into a file of the context's folder."""
        assert context.folder is not None  # noqa: S101  (a stage has one)
        anatomy, stream = context.anatomy, _stream(context.anatomy)
        files: dict[str, JSON] = {}
        for block in context.blocks():
            prefix = f"{anatomy.prefix}.{block.index}."
            for number, place in stream.of_block(block.index):
                grams = [self._gram(anatomy.model, stream, branch, block.block, prefix) for branch in place.branches]
                basis = ranks.share(partial(principal_basis, torch.stack(grams).sum(dim=0), len(grams[0])))
                files[str(number)] = ranks.share(partial(BasisFiles.write, context.folder / "bases", number, basis))
        return {"files": files}

    def apply(self, anatomy: Anatomy, plan: Mapping[str, JSON], folder: Path | None) -> Reshaped:
        """Turn every block when it is written."""
        assert folder is not None  # noqa: S101  (`plan` has kept files in it)
        stream, files = _stream(anatomy), plan["files"]
        assert isinstance(files, dict)  # noqa: S101  (a plan that `plan` has made)
        widths = [*[int(anatomy.model.config.hidden_size)] * (len(stream.places) - 1), None]
        bases = BasisFiles(folder / "bases", files, widths)
        stack = find_stack(anatomy.model)
        prefixes = [stack.prefix(block) for block in range(anatomy.blocks)]
        rotation = Rotation(stream, bases, prefixes, shortcuts=True)

        def tensors(block: int | None) -> Mapping[str, Tensor]:
            model = anatomy.model
            return rotation.outside(model) if block is None else rotation.of_block(model, block)

        outline = self.outline(anatomy)
        return Reshaped(outline.blocks, outline.config, outline.shapes, tensors=tensors)

    def _gram(self, model: Any, stream: Residual, branch: Branch, block: nn.Module, prefix: str) -> Tensor:
        """Return the gram matrix of the columns [hidden, hidden] float64 whose eigenvectors are the basis."""
        leading = _leading(model)
        norm = block.get_submodule(branch.norm.removeprefix(prefix))
        scales = norm.get_parameter("weight").data.double() + stream.norm.endswith("plus_one")
        lead = torch.zeros(len(scales), len(scales), dtype=torch.float64)
        every = torch.zeros_like(lead)
        for reader in branch.readers:
            name = reader.name.removeprefix(prefix)
            weight = block.get_parameter(name).data.movedim(reader.axis, -1).flatten(0, -2).double() * scales
            gram = weight.T @ weight
            every += gram
            if name.removesuffix(".weight") in leading:
                lead += gram
        if self.options.readers == "all" or not bool(lead.any()):
            return every
        return lead + every * (_OTHERS * lead.trace() / every.trace())


def _leading(model: Any) -> set[str]:
    """Return the names of key and gate projections, relative to a block; of experts that of the parameter."""
    spec = family(model)
    return {spec.attention.key, *((mlp.gate or mlp.up).replace(".*.", ".") for mlp in spec.mlps)}


def _stream(anatomy: Anatomy) -> Residual:
    """Return the residual stream.

    Raises:
        UnsupportedFamily: It cannot be turned, or the direction of the mean stays.
        PlanError: It is turned already.
    """
    if anatomy.shapes.stream is not None:
        raise PlanError("the model's residual stream has bases already", hint="Rotate the model it was made from.")
    stream = residual(anatomy.model, find_stack(anatomy.model))
    if stream.centred:
        raise UnsupportedFamily(
            f"{type(anatomy.model).__name__} has norms that subtract the mean, a direction that no rotation may mix "
            "with others: columns of its weights cannot be made orthogonal",
            hint="Use wina without rotation.",
        )
    return stream
