"""Architectures of shapes that no configuration has: built as the configuration says, then given their shapes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import Shapes
from sparsekit.models.sliced import slice_shapes
from sparsekit.models.structure import Stack, find_stack
from sparsekit.models.widths import narrow


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


def parameters(model: Any) -> int:
    """Return the number of a model's parameters, those that are tied to others not counted; on meta none are shared."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
