"""Checkpoints with a sliced residual stream: random weights of the given widths, written by `narrow.write`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint.shapes import Shapes, Stream
from sparsekit.models.residual import residual
from sparsekit.models.sliced import slice_shapes
from sparsekit.models.structure import find_stack
from tests.support import narrow, tiny

SEVEN = (24, 20, 16, 24, 12, 28, 32)
"""Widths of the places of a tiny model: three blocks, each of two places, and the head."""


def widths(family: str, **changes: Any) -> tuple[int, ...]:
    """Return different widths for the places of a tiny model.

    Mixtures of experts write what they read; GPT-2 ends as it begins.
    """
    count = len(residual(*_parts(tiny.build(family, **changes))).places)
    if family in tiny.MOE_FAMILIES:
        return (16, 24, 24, 16, 16, 24, 24)  # multiples of 8: bf16 experts are multiplied in rows of 16 bytes
    return (*SEVEN[: count - 1], SEVEN[0] if family == "gpt2" else SEVEN[-1])


def build(family: str, stream: Stream, *, seed: int = 0, **changes: Any) -> Any:
    """Return a random model of a family with a sliced stream; its configuration knows nothing of it."""
    model = tiny.build(family, tie_word_embeddings=False, seed=seed, **changes)
    slice_shapes(*_parts(model), stream)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + noise * 0.05)
    return model


def write(model: Any, folder: Path, stream: Stream) -> Path:
    """Write a sliced model, its tokenizer and configuration as a folder, and return it."""
    return narrow.write(model, folder, Shapes(stream=stream))


def identities(model: Any) -> Any:
    """Give all shortcuts of a model the value of an identity, and return it."""
    for name, parameter in model.named_parameters():
        if ".shortcuts." in name:
            parameter.data = torch.eye(*parameter.shape, dtype=parameter.dtype)
    return model


def uncut(family: str, **changes: Any) -> Any:
    """Return a random model all of whose sums have shortcuts that change nothing; weights are those of `tiny`."""
    model = tiny.build(family, tie_word_embeddings=False, **changes)
    count = len(residual(*_parts(model)).places)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    slice_shapes(*_parts(model), Stream((model.config.hidden_size,) * count, shortcuts=True))
    model.load_state_dict(weights, strict=False)
    return identities(model)


def _parts(model: Any) -> tuple[Any, Any]:
    return model, find_stack(model)
