"""Architectures of shapes that no configuration has: built as the configuration says, then given their shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import PLAIN, Shapes, Widths
from sparsekit.models.block import Block
from sparsekit.models.feeds import head_size
from sparsekit.models.sliced import slice_shapes
from sparsekit.models.structure import Stack, find_stack
from sparsekit.models.widths import narrow

_NEURONS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configurations call the number of neurons of an MLP."""


def give_shapes(model: Any, stack: Stack, shapes: Shapes) -> None:
    """Give a model on meta, built as its configuration says, other shapes.

    Raises:
        ModelError: They are of another model.
        UnsupportedFamily: A family that cannot have them.
    """
    if shapes.blocks:
        narrow(model, stack, shapes.blocks)
    if shapes.stream is not None:
        slice_shapes(model, stack, shapes.stream)


def variant(model: Any, changes: Mapping[str, JSON], shapes: Shapes) -> Any:
    """Build, on meta, the architecture that a changed configuration and shapes mean.

    Args:
        model: A transformers model; its configuration is the one that is changed.
        changes: Keys of config.json.
        shapes: Of the new architecture.
    """
    from accelerate import init_empty_weights

    config: Any = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    with init_empty_weights(include_buffers=False):
        built = type(model)(config).train(model.training)
    give_shapes(built, find_stack(built), shapes)
    return built


def plainly(model: Any, shapes: Shapes) -> tuple[dict[str, JSON], Shapes]:
    """Return the keys of config.json that say what shapes say, and the shapes that are then left to be said.

    Blocks that are all alike are an ordinary architecture if the configuration has keys for their widths. Whether it
    has, and means by them just these shapes, is seen by building both on meta.

    Args:
        model: A transformers model, of ordinary shapes by its configuration; its parameters may be on meta.
        shapes: Of the new architecture.

    Returns:
        Changes and plain shapes; no changes and `shapes` themselves where no configuration says them.
    """
    widths = set(shapes.blocks)
    if shapes.stream is not None or len(widths) != 1 or shapes.plain or shapes.blocks[0].channels is not None:
        return {}, shapes
    wanted = _sizes(variant(model, {}, shapes))
    for changes in _candidates(model, shapes.blocks[0]):
        if _built(model, changes) == wanted:
            return changes, PLAIN
    return {}, shapes


def _candidates(model: Any, width: Widths) -> Iterator[dict[str, JSON]]:
    """Yield what a configuration may call the width of its blocks."""
    config = model.config
    known, names = config.to_dict(), getattr(config, "attribute_map", None) or {}
    heads: dict[str, JSON] = {}
    if width.groups is not None:
        groups = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        copies = config.num_attention_heads // groups
        heads = {"num_attention_heads": width.groups * copies, "head_dim": head_size(config)}
        heads |= {"num_key_value_heads": width.groups}
    for key in _NEURONS if width.neurons is not None else ("",):
        mlp: dict[str, JSON] = {key: width.neurons} if key else {}
        changes = {names.get(name, name): value for name, value in {**heads, **mlp}.items()}
        if not key or names.get(key, key) in known:
            yield changes


def _built(model: Any, changes: Mapping[str, JSON]) -> object:
    """Return the sizes of the architecture that a changed configuration means; None where there is no such."""
    try:
        type(model.config).from_dict({**model.config.to_dict(), **changes})
        return _sizes(variant(model, changes, PLAIN))
    except Exception:  # configurations and architectures refuse sizes with all kinds of errors
        return None


def _sizes(model: Any) -> tuple[dict[str, tuple[int, ...]], list[dict[str, float]]]:
    """Return the shapes of all parameters and buffers, and the numbers that attentions compute with."""
    stack = find_stack(model)
    blocks = [Block.of(model, stack, index) for index in range(len(stack.blocks))]
    numbers = [{key: x for key, x in vars(block.attention).items() if type(x) in (int, float)} for block in blocks]
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors}, numbers


def parameters(model: Any) -> int:
    """Return the number of a model's parameters, those that are tied to others not counted; on meta none are shared."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
