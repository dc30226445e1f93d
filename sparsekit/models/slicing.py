"""What a model becomes when its residual stream is cut to other widths: shapes, number of parameters, configuration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import Shapes, Stream
from sparsekit.models.feeds import head_size
from sparsekit.models.residual import Residual
from sparsekit.models.shapes import variant
from sparsekit.models.sliced import sliced_sizes


def sliced_parameters(model: Any, residual: Residual, widths: Sequence[int], *, shortcuts: bool) -> int:
    """Return the number of parameters of a model whose stream has these widths; its head is tied to nothing."""
    total = sum(math.prod(size) for size in sliced_sizes(model, residual, widths).values())
    return total + shortcuts * sum(here * behind for here, behind in itertools.pairwise(widths))


def plain_config(model: Any, residual: Residual, shapes: Shapes, width: int) -> dict[str, JSON] | None:
    """Return the keys of config.json by which transformers builds the model with a narrower stream; None: it cannot.

    Args:
        model: A transformers model; its parameters may be on meta.
        residual: Its stream.
        shapes: Of its blocks.
        width: Of the stream, everywhere.
    """
    config = model.config
    names = getattr(config, "attribute_map", None) or {}
    changes: dict[str, JSON] = {
        names.get("hidden_size", "hidden_size"): width,
        "head_dim": head_size(config),
        "tie_word_embeddings": False,
    }
    try:
        type(config).from_dict({**config.to_dict(), **changes})
        built = variant(model, changes, shapes)
    except Exception:  # configurations and architectures refuse sizes with all kinds of errors
        return None
    found = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    return changes if found == sliced_sizes(model, residual, [width] * len(residual.places)) else None


def untied(width: Sequence[int], *, shortcuts: bool, shapes: Shapes) -> tuple[dict[str, JSON], Shapes]:
    """Return the keys of config.json and the shapes of a stream that only sparsekit builds."""
    return {"tie_word_embeddings": False}, Shapes(shapes.blocks, Stream(tuple(width), shortcuts))
