"""What config.json says of a checkpoint that only sparsekit loads: packed, or with blocks of different widths.

It stands in `quantization_config`, which makes transformers ask sparsekit. The key `per_layer_config` of transformers
is no place for widths: no architecture here reads it when it is built, and a value that differs between blocks makes
the global one unreadable, so that the model cannot even be set up to be narrowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.errors import ModelError

METHOD = "sparsekit"
FORMAT_VERSION = 1
_KINDS = ("groups", "neurons")


@dataclass(frozen=True)
class Widths:
    """Widths of one block; None: as the rest of the configuration says.

    Attributes:
        groups: Key-value groups of its attention.
        neurons: Inputs of its down projection.
    """

    groups: int | None = None
    neurons: int | None = None


def config_entries(*, pattern: str | None = None, widths: Sequence[Widths] | None = None) -> dict[str, Any]:
    """Return the entries of config.json for weights that are packed, or narrow, or both; nothing for plain ones.

    Weights that need such an entry are stored under `PACKED_STEM`.

    Args:
        pattern: Pattern of the packed tensors; None: nothing is packed.
        widths: One for each block; None, or all of them as the configuration says: nothing is narrow.
    """
    narrow = [width for width in widths or () if width != Widths()]
    if pattern is None and not narrow:
        return {}
    # Never sparsity_config in here: vLLM refuses it.
    entry: dict[str, Any] = {"quant_method": METHOD, "format_version": FORMAT_VERSION}
    if pattern is not None:
        entry["pattern"] = pattern
    if narrow:
        entry["widths"] = {kind: [getattr(width, kind) for width in widths or ()] for kind in _KINDS}
    return {"quantization_config": entry}


def read_widths(quantization: object) -> tuple[Widths, ...] | None:
    """Return the widths that a `quantization_config` holds, one for each block; None without any.

    Raises:
        ModelError: They are not as `config_entries` writes them.
    """
    given = quantization.get("widths") if isinstance(quantization, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping) or set(given) != {*_KINDS}:
        raise _damaged(f"need an object with {' and '.join(_KINDS)}")
    for kind in _KINDS:
        counts = given[kind]
        if not isinstance(counts, list) or not all(n is None or (type(n) is int and n > 0) for n in counts):
            raise _damaged(f"{kind} is no list of null and positive whole numbers")
    groups, neurons = (given[kind] for kind in _KINDS)
    if len(groups) != len(neurons):
        raise _damaged(f"groups of {len(groups)} blocks, neurons of {len(neurons)}")
    return tuple(Widths(*pair) for pair in zip(groups, neurons, strict=True))


def widths_after(widths: tuple[Widths, ...] | None, changes: Mapping[str, Any]) -> tuple[Widths, ...] | None:
    """Return the widths of a model that had `widths`, after these keys of its config.json have changed."""
    return read_widths(changes["quantization_config"]) if "quantization_config" in changes else widths


def holds_packed(quantization: object) -> bool:
    """Whether a `quantization_config` of ours says that tensors are packed, not narrow alone."""
    entry = quantization if isinstance(quantization, Mapping) else {}
    return entry.get("widths") is None or entry.get("pattern") is not None


def _damaged(problem: str) -> ModelError:
    return ModelError(
        problem, where="config.json: quantization_config.widths", hint="It was changed; fetch config.json again."
    )
