"""Blocks whose residual stream has a width of its own at every place, joined by shortcut matrices.

The configuration has one width. So the architecture is built with it, on meta, and every parameter of the stream gets
its shape afterwards. Where the stream changes from place to place, blocks become subclasses of themselves whose forward
sends it through a shortcut at each sum; attention, MLP and norms are the architecture's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sparsekit.checkpoint.shapes import Stream
from sparsekit.errors import ModelError, UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.residual import Residual, residual
from sparsekit.models.roles import family
from sparsekit.models.structure import SHORTCUTS, Stack


def slice_shapes(model: Any, stack: Stack, stream: Stream) -> None:
    """Give a model on meta the shapes that belong to its stream, and shortcuts where it has them.

    Args:
        model: A transformers model as its configuration says, parameters on meta.
        stack: Its blocks.
        stream: Its widths.

    Raises:
        ModelError: Not one width for each place, or one that the model cannot have.
        UnsupportedFamily: A family whose stream cannot be sliced so.
    """
    found = residual(model, stack)
    _check(model, found, stream)
    for name, size in sliced_sizes(model, found, stream.widths).items():
        _resize(model, name, size)
    if not stream.shortcuts:
        return
    for index, block in enumerate(stack.blocks):
        places = found.of_block(index)
        wiring = _wiring(model, found, stack.prefix(index), index)
        sizes = [(stream.widths[number], stream.widths[number + 1]) for number, _ in places]
        dtype = model.get_parameter(places[0][1].branches[0].readers[0].name).dtype
        shortcuts = torch.nn.ModuleList([_shortcut(*size, dtype) for size in sizes])
        setattr(block, SHORTCUTS, shortcuts)
        kind: Any = type(block)
        block.__class__ = _wired(kind)
        block.__dict__["_wiring"] = wiring


def sliced_sizes(model: Any, found: Residual, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters of a model whose stream has these widths, shortcuts apart, by name.

    Args:
        model: A transformers model; its parameters may be on meta.
        found: Its stream.
        widths: One for each place.
    """
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def give(name: str, axis: int, width: int) -> None:
        size = [*model.get_parameter(name).shape]  # a tied head is no parameter of its own yet
        size[axis] = width
        sizes[name] = tuple(size)

    for matrix in found.embeddings:
        give(matrix.name, matrix.axis, widths[0])
    for number, place in enumerate(found.places):
        for branch in place.branches:
            norm = model.get_submodule(branch.norm)
            for name, _ in norm.named_parameters():
                give(f"{branch.norm}.{name}", -1, widths[number])
            for reader in branch.readers:
                give(reader.name, reader.axis, widths[number])
            for writer in branch.writers:
                give(writer.name, writer.axis, widths[number + 1])
                if writer.bias is not None:
                    give(writer.bias, -1, widths[number + 1])
    return sizes


@dataclass(frozen=True)
class Wiring:
    """What a block with shortcuts runs, by names relative to it.

    Attributes:
        norms: In front of attention and MLP; the same where one serves both.
        attention: The module.
        mlp: Modules that run one after the other.
        parallel: Attention and MLP read the same stream.
        multiplier: Of branches, in the sum.
        names: Arguments of the architecture's forward, behind the stream.
    """

    norms: tuple[str, str]
    attention: str
    mlp: tuple[str, ...]
    parallel: bool
    multiplier: float
    names: tuple[str, ...]


def _check(model: Any, found: Residual, stream: Stream) -> None:
    widths, hidden = stream.widths, int(model.config.hidden_size)
    if len(widths) != len(found.places):
        raise _damaged(f"{len(widths)} of them, {type(model).__name__} reads its stream at {len(found.places)} places")
    if max(widths) > hidden:
        raise _damaged(f"{max(widths)} is more than the configuration's hidden_size {hidden}")
    if family(model).same_ends and widths[0] != widths[-1]:
        raise UnsupportedFamily(
            f"the code of {type(model).__name__} needs a stream that leaves the blocks as wide as it enters them; it "
            f"would be {widths[0]} and {widths[-1]}",
            hint="Slice with slice_head: true, or with rotation: global.",
        )
    for number, place in enumerate(found.places[:-1]):
        for writer in (writer for branch in place.branches for writer in branch.writers):
            if model.get_parameter(writer.name).ndim == 3 and widths[number] != widths[number + 1]:
                raise UnsupportedFamily(
                    f"experts write as wide a stream as they read; here they would read {widths[number]} and write "
                    f"{widths[number + 1]}",
                    where=writer.name,
                    hint="Slice with one width for all: slice_head: true, and no schedule.",
                )


def _damaged(problem: str) -> ModelError:
    return ModelError(
        f"its widths are not this model's: {problem}",
        where="config.json: quantization_config.stream",
        hint="It was changed, or belongs to another model; fetch it again.",
    )


def _resize(model: Any, name: str, size: tuple[int, ...]) -> None:
    """Give a parameter on meta another shape, and correct the sizes that its module knows."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters[leaf]
    if tuple(old.shape) == size:
        return
    empty = torch.empty(size, dtype=old.dtype, device="meta")
    module._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
    changed = {(before, after) for before, after in zip(old.shape, size, strict=True) if before != after}
    ((before, after),) = changed
    by_kind = {
        "in_features": (-1, 2), "out_features": (-2, 2), "nx": (-2, 2), "nf": (-1, 2), "embedding_dim": (-1, 2)
    }  # fmt: skip
    for attribute, (axis, ndim) in by_kind.items():
        if hasattr(module, attribute) and leaf == "weight" and len(size) == ndim:
            setattr(module, attribute, size[axis])
    if isinstance(module, torch.nn.LayerNorm):
        module.normalized_shape = size
    for attribute in ("hidden_size", "hidden_dim"):  # experts and routers know the width that they read
        if getattr(module, attribute, None) == before:
            setattr(module, attribute, after)


def _shortcut(here: int, behind: int, dtype: torch.dtype) -> Any:
    """Return a shortcut on meta, [behind, here]."""
    weight = torch.empty(behind, here, dtype=dtype, device="meta")
    return _shortcut_class()(torch.nn.Parameter(weight, requires_grad=False))


@cache
def _shortcut_class() -> type[Any]:
    """Return the class of shortcuts; torch is imported late."""

    class Shortcut(torch.nn.Module):
        """Carries the stream from one basis to the next. No nn.Linear: it is no target of pruning."""

        def __init__(self, weight: Any) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, self.weight)

    return Shortcut


def _wiring(model: Any, found: Residual, prefix: str, index: int) -> Wiring:
    spec = family(model)
    if not spec.shortcuts:
        raise UnsupportedFamily(
            f"blocks of {type(model).__name__} cannot have shortcuts: their code adds the stream in a way of its own",
            hint="Slice with rotation: global, which needs none.",
        )
    places = [place for _, place in found.of_block(index)]
    branches = [branch for place in places for branch in place.branches]
    norms = [branch.norm.removeprefix(f"{prefix}.") for branch in (branches[0], branches[-1])]
    block = model.get_submodule(prefix)
    down = spec.mlps[0].down
    mlp = (spec.mlps[0].up, "activation_fn", down) if "." not in down else (down.partition(".")[0],)
    names = tuple(inspect.signature(type(block).forward).parameters)[2:]
    return Wiring(
        (norms[0], norms[1]),
        spec.attention.output.rpartition(".")[0],
        mlp,
        len(places) == 1,
        float(getattr(block, "residual_multiplier", 1.0)),
        tuple(name for name in names if name != "kwargs"),
    )


@cache
def _wired(kind: Any) -> Any:
    """Return a class of blocks that is one of `kind`, by another forward.

    It keeps the name: device maps and recorders of hidden states ask for it.
    """

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        wiring: Wiring = self._wiring
        kwargs.update(zip(wiring.names, args, strict=False))
        shortcuts = getattr(self, SHORTCUTS)
        norm, other = (self.get_submodule(name) for name in wiring.norms)
        normed = norm(hidden_states)
        branch = _first(self.get_submodule(wiring.attention)(normed, **kwargs))
        stream = shortcuts[0](hidden_states)
        if wiring.parallel:
            normed = normed if other is norm else other(hidden_states)
            return stream + wiring.multiplier * (branch + _run_mlp(self, wiring, normed))
        stream = stream + wiring.multiplier * branch
        return shortcuts[1](stream) + wiring.multiplier * _run_mlp(self, wiring, other(stream))

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _run_mlp(block: Any, wiring: Wiring, x: Any) -> Any:
    for name in wiring.mlp:
        x = _first(block.get_submodule(name)(x) if name in block._modules else getattr(block, name)(x))
    return x


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
