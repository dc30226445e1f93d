"""Does a gate that a file describes belong at the module that it names?

Names in the file are paths of modules. They may lead to what a calibrator can have thinned out and to nothing else: the
input of a linear of a block or of all its experts' projections, the activated gate of an MLP, the neurons of an MLP. A
router, the head or a norm is never meant, whatever a file says.
"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from sparsekit.errors import CheckpointError, UnsupportedFamily
from sparsekit.models.gates import Gaussian, OfPrompt, Placed, Threshold, TopK
from sparsekit.models.linears import is_experts, projections, routers
from sparsekit.models.roles import family
from sparsekit.models.sites import is_activation, neuron_makers
from sparsekit.models.structure import inside_block

if TYPE_CHECKING:
    from torch import nn

_HINT = "The file is damaged, or belongs to another model."


def fitting_module(model: Any, name: str, placed: Placed, where: str) -> nn.Module:
    """Return the module that a gate stands at, for experts the one that holds them all.

    Args:
        model: A transformers model; its parameters may be on meta, its linears packed.
        name: Of the signal.
        placed: Its gate.
        where: The file, for errors.

    Raises:
        CheckpointError: No such module, one that has no such signal, or a gate of another size.
    """

    def wrong(message: str) -> CheckpointError:
        return CheckpointError(message, where=f"{where}: {name}", hint=_HINT)

    path, _, last = name.rpartition(".")
    try:
        owner: nn.Module = model.get_submodule(path)
        experts = is_experts(owner) and last in projections(owner)
        module = owner if experts else model.get_submodule(name)
    except AttributeError:
        raise wrong("the model has no such module") from None
    found = inside_block(model, name)
    if found is None:
        raise wrong("it is in no block: only signals inside blocks are thinned out")
    block, inside = found
    if placed.kind == "gate":
        if experts or not is_activation(module):
            raise wrong(f"signal gate of {type(module).__name__}, which is no activation function")
        width = _neurons(model, block, inside)
        if width is None:
            raise wrong("signal gate, but its MLP has no gate")
    elif placed.kind == "neurons":
        width = None if experts else _neurons_into(model, block, inside)
        if width is None:
            raise wrong(f"signal neurons of {type(module).__name__}, which is no down projection of a plain MLP")
    else:
        width = _inputs(module, last if experts else None)
        if width is None or f"{inside}.weight" in routers(block):
            what = "a router" if width else type(module).__name__
            raise wrong(f"signal input of {what}, needed a linear")
    count = int(module.get_parameter(last).shape[0]) if experts else None
    if problem := _misfit(placed, width, count) or _remainder_misfit(placed, width, module):
        raise wrong(problem)
    return module


def _inputs(module: nn.Module, projection: str | None) -> int | None:
    """Return how many entries the input of a linear has, or that of a projection of experts; None for other modules."""
    if projection is not None:
        shape = module.get_parameter(projection).shape
        return int(shape[-2] if getattr(module, "is_transposed", False) else shape[-1])
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)  # nx: Conv1D
    return width if isinstance(width, int) and not list(module.children()) else None


def _neurons(model: Any, block: nn.Module, activation: str) -> int | None:
    """Return the width of the gate that an activation of a block makes; None where its MLP has none."""
    parent = activation.rpartition(".")[0]
    try:
        mlps = family(model).mlps
    except UnsupportedFamily:
        return None
    for child, module in block.get_submodule(parent).named_children():
        if any(mlp.gate is not None and fnmatch.fnmatchcase(f"{parent}.{child}", mlp.down) for mlp in mlps):
            return _inputs(module, None)
    return None


def _neurons_into(model: Any, block: nn.Module, down: str) -> int | None:
    """Return how many neurons a down projection of a block reads; None where it is none, or no rows make them."""
    try:
        makers = neuron_makers(family(model), down)
        width = _inputs(block.get_submodule(down), None)
        sizes = [(_outputs(block.get_submodule(maker)), rows) for maker, rows in makers]
    except (UnsupportedFamily, AttributeError):
        return None
    return width if width and sizes and all(found == rows * width for found, rows in sizes) else None


def _outputs(module: nn.Module) -> int | None:
    found = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return found if isinstance(found, int) else None


def _misfit(placed: Placed, width: int, experts: int | None) -> str | None:
    """Say in what a rule does not fit a signal of `width` entries, of so many experts; None where it fits."""
    match placed.gate:
        case Gaussian():
            return None
        case TopK(count, _) if count > width:
            return f"the {count} largest of {width} entries would be kept"
        case OfPrompt(count):
            return f"{count} of {width} neurons would be kept" if count > width else None
        case Threshold(sizes) | TopK(_, sizes):
            rows = [] if sizes.dim() == 1 else [sizes.shape[0]]
            if sizes.shape[-1] in (1, width) and rows in ([], [experts]):
                return None
            needed = f"{width}" if experts is None else f"{experts} x {width}"
            return f"{' x '.join(map(str, sizes.shape))} values for a signal of {needed}"
    return None


def _remainder_misfit(placed: Placed, width: int, module: nn.Module) -> str | None:
    if placed.remainder is None:
        return None
    outputs = _outputs(module)
    found = (placed.remainder.left.shape[0], placed.remainder.right.shape[1])
    return None if found == (outputs, width) else f"a remainder of {list(found)}, the linear is {[outputs, width]}"
