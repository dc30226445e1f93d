"""A configuration with fewer decoder blocks, and the proof that it means the same blocks.

Architectures say what a block is by its number: in lists with an entry for each, in lists of numbers, or by rules such
as "every fourth". Lists are cut; for all else the blocks that the new configuration builds are compared with those that
stay, and what differs is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import PLAIN, Shapes
from sparsekit.errors import UnsupportedFamily
from sparsekit.models.shapes import variant
from sparsekit.models.structure import find_stack

if TYPE_CHECKING:
    from torch import nn

_NUMBERS = ("mlp_only_layers",)
"""Lists of the numbers of blocks."""
_OWN_NUMBER = ("layer_idx", "layer_id", "layer_number", "block_idx")
"""What modules call their own number."""


def with_blocks(config: Any, kept: Sequence[int]) -> dict[str, JSON]:
    """Return the keys of config.json that say which blocks there are, for the blocks `kept` in their order."""
    count = int(config.num_hidden_layers)
    name = (getattr(config, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")
    changes: dict[str, JSON] = {name: len(kept)}
    for key, value in config.to_dict().items():
        if key in _NUMBERS and value:
            changes[key] = [place for place, block in enumerate(kept) if block in value]
        elif "layer" in key and isinstance(value, (list, tuple)) and len(value) == count:
            changes[key] = [value[block] for block in kept]
    return changes


def require_same_blocks(
    model: nn.Module, changes: dict[str, JSON], kept: Sequence[int], shapes: Shapes = PLAIN
) -> None:
    """Build the architecture that the changed configuration means; compare its blocks with those that stay.

    Args:
        model: The model as it is, on meta.
        changes: Keys of config.json.
        kept: Its blocks that stay.
        shapes: Of what is left.

    Raises:
        UnsupportedFamily: A block would be of another kind at its new place.
    """
    config: Any = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedFamily(
            f"{type(model).__name__} scales attention by the number of the block, which would change",
            where="config.json: scale_attn_by_inverse_layer_idx",
        )
    stack, shorter = find_stack(model), find_stack(variant(model, changes, shapes))
    for place, block in enumerate(kept):
        difference = _difference(stack.blocks[block], shorter.blocks[place])
        if difference:
            raise UnsupportedFamily(
                f"it would be block {place}, and blocks of that number are different in {type(model).__name__}: "
                f"{difference}",
                where=stack.prefix(block),
                hint="Choose other blocks to drop, or another architecture.",
            )


def _difference(old: nn.Module, new: nn.Module) -> str | None:
    """Return the first thing in which two blocks differ, their own number apart; None where they do not."""
    ours, theirs = (dict(block.named_modules()) for block in (old, new))
    if ours.keys() != theirs.keys():
        return f"module {sorted(ours.keys() ^ theirs.keys())[0]}"
    for name, module in ours.items():
        other = theirs[name]
        if type(module) is not type(other):
            return f"{name} is a {type(module).__name__}, not a {type(other).__name__}"
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, type(None)))
            if plain and key[0] != "_" and key not in _OWN_NUMBER and vars(other).get(key) != value:
                return f"{name}.{key} is {value}, not {vars(other).get(key)}"
        shapes, wanted = (
            {key: tuple(tensor.shape) for key, tensor in found.named_parameters(recurse=False)}
            for found in (module, other)
        )
        if shapes != wanted:
            return f"parameters of {name}"
    return None
