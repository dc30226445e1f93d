"""Do the weight files and config.json describe one model? Answered from headers, before any weight is read.

Without this a missing or misshapen tensor shows only when the walk arrives at its block, hours later on a large
model, and one outside the blocks never, if the method needs no activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.source import WeightFiles
from sparsekit.errors import CheckpointError, IndexMismatch, ModelError

if TYPE_CHECKING:
    from torch import Tensor

STORED = ("BF16", "F16", "F32")
"""Dtypes that parameters may be stored in."""


@dataclass(frozen=True)
class Becomes:
    """What transformers makes of a checkpoint tensor.

    Attributes:
        names: The parameters it becomes, or becomes a part of.
        plain: It becomes that parameter as it is: neither joined with others, nor split, nor turned.
    """

    names: tuple[str, ...]
    plain: bool


def check(module: Any, weights: WeightFiles, becomes: Mapping[str, Becomes]) -> None:
    """Refuse weights that the model on meta, `module`, cannot be loaded from.

    Raises:
        IndexMismatch: A parameter has no tensor.
        CheckpointError: A tensor has another shape than the configuration asks for.
        ModelError: A parameter is stored in a dtype that is not one of STORED.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for key, target in becomes.items():
        for name in target.names:
            if name in parameters:
                _check_entry(key, parameters[name], weights, plain=target.plain)
    made = {name for target in becomes.values() for name in target.names}
    # Of the names of a tied parameter one is enough: transformers fills in the others.
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    made |= {name for pair in tied.items() if made & {*pair} for name in pair}
    if absent := [name for name in parameters if name not in made]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise missing(f"{absent[0]}{more}", weights.folder)


def _check_entry(key: str, parameter: Tensor, weights: WeightFiles, *, plain: bool) -> None:
    location = weights.tensors[key]
    if parameter.is_floating_point() and location.entry.dtype not in STORED:
        raise ModelError(
            f"{key} is stored as {location.entry.dtype}; need {', '.join(STORED)}",
            where=str(weights.path(location.file)),
            hint="Prune the unquantised checkpoint.",
        )
    if plain and tuple(location.entry.shape) != tuple(parameter.shape):
        raise wrong_shape(key, location.entry.shape, parameter.shape, weights.path(location.file))


def wrong_shape(name: str, found: Sequence[int], needed: Sequence[int], where: Path) -> CheckpointError:
    """Return the error for a tensor whose shape is not the configuration's."""
    return CheckpointError(
        f"{name} has shape {list(found)}, the configuration needs {list(needed)}",
        where=str(where),
        hint="config.json and weights do not belong together; fetch both again.",
    )


def missing(names: str, where: Path) -> IndexMismatch:
    """Return the error for parameters that the weight files do not hold."""
    return IndexMismatch(
        f"the weights hold no tensor for {names}",
        where=str(where),
        hint="The checkpoint is incomplete, or config.json belongs to another model; fetch both again.",
    )
