"""What config.json says of a checkpoint that only sparsekit loads: packed, or of shapes that no configuration has.

It stands in `quantization_config`, which makes transformers ask sparsekit. The key `per_layer_config` of transformers
is no place for widths: no architecture here reads it when it is built, and a value that differs between blocks makes
the global one unreadable, so that the model cannot even be set up to be narrowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from sparsekit.errors import ModelError

METHOD = "sparsekit"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Widths:
    """Widths of one block; None: as the rest of the configuration says.

    Attributes:
        groups: Key-value groups of its attention.
        neurons: Inputs of its down projection.
        channels: Channels of a head of its attention.
        rotary: Which pairs of channels these are, ascending, in a family that turns pairs by the position.
    """

    groups: int | None = None
    neurons: int | None = None
    channels: int | None = None
    rotary: tuple[int, ...] | None = None


_KINDS = tuple(field.name for field in fields(Widths))
_ALWAYS = ("groups", "neurons")  # the other kinds are written where some block has them


@dataclass(frozen=True)
class Stream:
    """A residual stream narrower than the configuration's `hidden_size`.

    Attributes:
        widths: One for each place where a block reads it, in the order of the model, and one for what the head reads.
        shortcuts: Every sum of the stream and a branch has a matrix of its own that carries the stream over.
    """

    widths: tuple[int, ...]
    shortcuts: bool


@dataclass(frozen=True)
class Shapes:
    """In what a model's shapes differ from those of the rest of its configuration.

    Attributes:
        blocks: Widths of each block; empty: of none.
        stream: Its residual stream; None: as the configuration says.
    """

    blocks: tuple[Widths, ...] = ()
    stream: Stream | None = None

    @property
    def plain(self) -> bool:
        """Whether they do not differ at all."""
        return self.stream is None and all(width == Widths() for width in self.blocks)

    @property
    def chained(self) -> bool:
        """Whether shortcuts carry the residual stream from place to place, each in a basis of its own."""
        return self.stream is not None and self.stream.shortcuts

    def of_blocks(self, kept: Sequence[int], count: int) -> Shapes:
        """Return the shapes of the model that has only the blocks `kept` of `count`, in their order."""
        blocks = tuple(self.blocks[block] for block in kept) if self.blocks else ()
        if self.stream is None:
            return Shapes(blocks)
        places = (len(self.stream.widths) - 1) // count  # of each block; without shortcuts all have the same width
        widths = self.stream.widths[: places * len(kept) + 1]
        return Shapes(blocks, Stream(widths, self.stream.shortcuts))

    def narrowed(self, widths: Sequence[Widths]) -> Shapes:
        """Return these shapes with other widths of the blocks; a None among those leaves what there was."""
        old = self.blocks or (Widths(),) * len(widths)
        new = [
            Widths(*(b if b is not None else a for a, b in ((getattr(w, k), getattr(n, k)) for k in _KINDS)))
            for w, n in zip(old, widths, strict=True)
        ]
        return Shapes(tuple(new), self.stream)


PLAIN = Shapes()


def config_entries(shapes: Shapes, pattern: str | None = None) -> dict[str, Any]:
    """Return the entries of config.json for weights that are packed, or of other shapes; nothing for plain ones.

    Weights that need such an entry are stored under `PACKED_STEM`.

    Args:
        shapes: Of the model.
        pattern: Pattern of the packed tensors; None: nothing is packed.
    """
    if pattern is None and shapes.plain:
        return {}
    # Never sparsity_config in here: vLLM refuses it.
    entry: dict[str, Any] = {"quant_method": METHOD, "format_version": FORMAT_VERSION}
    if pattern is not None:
        entry["pattern"] = pattern
    if any(width != Widths() for width in shapes.blocks):
        listed = {kind: [getattr(width, kind) for width in shapes.blocks] for kind in _KINDS}
        entry["widths"] = {kind: found for kind, found in listed.items() if kind in _ALWAYS or any(found)}
        if "rotary" in entry["widths"]:
            entry["widths"]["rotary"] = [pairs and [*pairs] for pairs in listed["rotary"]]
    if shapes.stream is not None:
        entry["stream"] = {"widths": [*shapes.stream.widths], "shortcuts": shapes.stream.shortcuts}
    return {"quantization_config": entry}


def read_shapes(quantization: object) -> Shapes:
    """Return the shapes that a `quantization_config` tells of; plain ones without any.

    Raises:
        ModelError: They are not as `config_entries` writes them.
    """
    entry = quantization if isinstance(quantization, Mapping) else {}
    return Shapes(_blocks(entry.get("widths")), _stream(entry.get("stream")))


def holds_packed(quantization: object) -> bool:
    """Whether a `quantization_config` of ours says that tensors are packed, not of other shapes alone."""
    entry = quantization if isinstance(quantization, Mapping) else {}
    return (entry.get("widths") is None and entry.get("stream") is None) or entry.get("pattern") is not None


def _blocks(given: object) -> tuple[Widths, ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not {*_ALWAYS} <= set(given) <= {*_KINDS}:
        others = [kind for kind in _KINDS if kind not in _ALWAYS]
        raise _damaged("widths", f"need an object with {' and '.join(_ALWAYS)}, at most {' and '.join(others)} beside")
    for kind, found in given.items():
        form, what = (_is_pairs, "lists of ascending") if kind == "rotary" else (_is_width, "positive")
        if not isinstance(found, list) or not all(each is None or form(each) for each in found):
            raise _damaged("widths", f"{kind} is no list of null and {what} whole numbers")
    kinds = [kind for kind in _KINDS if kind in given]
    if len({len(given[kind]) for kind in kinds}) != 1:
        raise _damaged("widths", ", ".join(f"{kind} of {len(given[kind])} blocks" for kind in kinds))
    blocks = [dict(zip(kinds, found, strict=True)) for found in zip(*(given[kind] for kind in kinds), strict=True)]
    for number, found in enumerate(blocks):
        pairs = found.get("rotary")
        if pairs is not None:
            if found.get("channels") != 2 * len(pairs):
                raise _damaged("widths", f"block {number} has {found.get('channels')} channels in {len(pairs)} pairs")
            found["rotary"] = tuple(pairs)
    return tuple(Widths(**found) for found in blocks)


def _stream(given: object) -> Stream | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or set(given) != {"widths", "shortcuts"}:
        raise _damaged("stream", "need an object with widths and shortcuts")
    widths, shortcuts = given["widths"], given["shortcuts"]
    if not isinstance(widths, list) or not widths or not all(map(_is_width, widths)):
        raise _damaged("stream", "widths is no list of positive whole numbers")
    if not isinstance(shortcuts, bool):
        raise _damaged("stream", f"shortcuts is {shortcuts!r}, not true or false")
    if not shortcuts and len({*widths}) > 1:
        raise _damaged("stream", "without shortcuts all widths must be the same")
    return Stream(tuple(widths), shortcuts)


def _is_width(value: object) -> bool:
    return type(value) is int and value > 0


def _is_pairs(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(type(pair) is int and pair >= 0 for pair in value):
        return False
    return all(one < other for one, other in pairwise(value))


def _damaged(key: str, problem: str) -> ModelError:
    return ModelError(
        problem, where=f"config.json: quantization_config.{key}", hint="It was changed; fetch config.json again."
    )
