"""A residual stream narrower than the configuration says, of one width at each place where it is read.

Heads, rotary tables and the scale of embeddings stay as the configuration's `hidden_size` makes them. What has an axis
of the stream is told by `residual`: readers and norms of a place, writers of the place before it, embeddings of the
first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.shapes import Stream
from sparsekit.errors import ModelError, UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.residual import Residual, residual
from sparsekit.models.roles import family
from sparsekit.models.structure import Stack, find_stack

if TYPE_CHECKING:
    from torch import Tensor, nn

_OWN_WIDTH = ("hidden_dim", "hidden_size")
"""What routers and experts call the width of the stream."""


def slice_shapes(model: Any, stack: Stack, stream: Stream) -> None:
    """Give a model on meta the shapes, and its blocks the shortcuts, of a sliced stream.

    Args:
        model: A transformers model as its configuration says, parameters on meta.
        stack: Its blocks.
        stream: Its residual stream.

    Raises:
        ModelError: It is of another model.
        UnsupportedFamily: A family whose stream cannot be sliced so.
    """
    from sparsekit.models.shortcuts import add_shortcuts

    model, stack = _with_head(model, stack)
    found = residual(model, stack)
    _check(model, found, stream)
    for name, axis, width in _axes(model, found, stream.widths):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.new_empty(_sized(parameter, axis, width))
        _tell(model.get_submodule(name.rpartition(".")[0]), axis, width)
    for index, block in enumerate(stack.blocks if stream.shortcuts else ()):
        numbers = [number for number, _ in found.of_block(index)]
        add_shortcuts(model, block, stream.widths[numbers[0] : numbers[-1] + 2])


def _with_head(model: Any, stack: Stack) -> tuple[Any, Stack]:
    """Return a model and its blocks; a bare base model, which reads no logits, inside one that does."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    if model.base_model is not model:
        return model, stack
    with init_empty_weights():
        whole = AutoModelForCausalLM.from_config(model.config)
    setattr(whole, whole.base_model_prefix, model)
    return whole, find_stack(whole)


def sliced_sizes(model: Any, found: Residual, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters of a model whose stream has these widths, shortcuts apart, by name.

    Args:
        model: A transformers model; its parameters may be on meta.
        found: Its stream.
        widths: One for each place.
    """
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, axis, width in _axes(model, found, widths):
        sizes[name] = _sized(model.get_parameter(name), axis, width)  # a tied head is no parameter of its own yet
    return sizes


def _sized(parameter: Tensor, axis: int, width: int) -> tuple[int, ...]:
    size = [*parameter.shape]
    size[axis] = width
    return tuple(size)


def _axes(model: Any, found: Residual, widths: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Yield name, axis (counted from the end) and new size of all parameters that have an axis of the stream."""
    for matrix in found.embeddings:
        yield matrix.name, matrix.axis, widths[0]
    for number, place in enumerate(found.places):
        for branch in place.branches:
            for name, _ in model.get_submodule(branch.norm).named_parameters():
                yield f"{branch.norm}.{name}", -1, widths[number]
            for reader in branch.readers:
                yield reader.name, reader.axis, widths[number]
            for writer in branch.writers:
                yield writer.name, writer.axis, widths[number + 1]
                if writer.bias is not None:
                    yield writer.bias, -1, widths[number + 1]


def _check(model: Any, found: Residual, stream: Stream) -> None:
    widths, hidden, name = stream.widths, int(model.config.hidden_size), type(model).__name__
    if len(widths) != len(found.places):
        raise _damaged(f"{len(widths)} widths, {name} reads it at {len(found.places)} places")
    if max(widths) > hidden:
        raise _damaged(f"a width of {max(widths)}, the configuration's hidden_size is {hidden}")
    if getattr(model.config, "tie_word_embeddings", False):
        raise _damaged("tie_word_embeddings is true, a sliced stream has a head of its own")
    if family(model).sums.same_ends and widths[0] != widths[-1]:
        raise UnsupportedFamily(
            f"the code of {name} needs a stream that leaves the blocks as wide as it enters them; it would be "
            f"{widths[0]} and {widths[-1]}",
            hint="Slice with slice_head: true, or with rotation: global.",
        )
    for place, (here, behind) in zip(found.places, itertools.pairwise(widths), strict=False):
        writers = [writer for branch in place.branches for writer in branch.writers]
        if here != behind and any(model.get_parameter(writer.name).ndim > 2 for writer in writers):
            raise UnsupportedFamily(
                f"experts write as wide a stream as they read; here they would read {here} and write {behind}",
                where=writers[0].name,
                hint="Slice with one width for all: slice_head: true, and no schedule.",
            )


def _tell(module: nn.Module, axis: int, width: int) -> None:
    """Correct what a module knows of its parameter's size."""
    from transformers.pytorch_utils import Conv1D

    changes: dict[str, Any]
    if isinstance(module, torch.nn.Linear):
        changes = {"in_features" if axis == -1 else "out_features": width}
    elif isinstance(module, Conv1D):
        changes = {"nf" if axis == -1 else "nx": width}
    elif isinstance(module, torch.nn.Embedding):
        changes = {"embedding_dim": width}
    elif isinstance(module, torch.nn.LayerNorm):
        changes = {"normalized_shape": (width,)}
    else:
        changes = {name: width for name in _OWN_WIDTH if hasattr(module, name)}
    for name, value in changes.items():
        setattr(module, name, value)


def _damaged(problem: str) -> ModelError:
    return ModelError(
        f"its residual stream is not this model's: {problem}",
        where="config.json: quantization_config.stream",
        hint="It was changed, or belongs to another model; fetch config.json again.",
    )
