"""Do the weight files and config.json describe one model? Answered from headers, before any weight is read.

Without this a missing or misshapen tensor shows only when the walk arrives at its block, hours later on a large
model, and one outside the blocks never, if the method needs no activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.source import WeightFiles
from sparsekit.errors import CheckpointError, IndexMismatch, ModelError
from sparsekit.models.structure import SHORTCUTS

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


def renamed(module: Any, mapping: Sequence[Any], keys: Iterable[str]) -> dict[str, Becomes]:
    """Ask transformers which parameter each checkpoint tensor becomes.

    Args:
        module: The model; its parameters may be on meta.
        mapping: Its checkpoint conversion.
        keys: Names of the tensors.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = module.state_dict()
    found: dict[str, Becomes] = {}
    for key in sorted(keys):
        name, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        # A tensor that is split is named after its first part only.
        parts = next((c.target_patterns for c in converters if pattern in c.source_patterns), [""])
        names = tuple(name.replace(parts[0], part, 1) for part in parts)
        found[key] = Becomes(names, plain=pattern is None)
    return found


def require_all(module: Any, becomes: Mapping[str, Becomes], where: Path) -> None:
    """Refuse weights that lack a parameter of the model.

    Raises:
        IndexMismatch: naming the first.
    """
    made = {name for target in becomes.values() for name in target.names}
    # Of the names of a tied parameter one is enough: transformers fills in the others.
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    made |= {name for pair in tied.items() if made & {*pair} for name in pair}
    if absent := [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in made]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise missing(f"{absent[0]}{more}", where)


def require_no_stray(module: Any, becomes: Mapping[str, Becomes], where: Path) -> None:
    """Refuse weights that hold a shortcut which the model has no place for: it would compute without it.

    Raises:
        IndexMismatch: naming the first.
    """
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for key, target in becomes.items():
        if f".{SHORTCUTS}." in key and not known & {*target.names}:
            raise IndexMismatch(
                f"the model has no place for {key}",
                where=str(where),
                hint="config.json does not say that it is there; fetch both again.",
            )


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
    require_all(module, becomes, weights.folder)
    require_no_stray(module, becomes, weights.folder)


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
