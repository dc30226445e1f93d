"""The signals of a block that can be thinned out: inputs of linears, activated gates of MLPs."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.contracts import Site
from sparsekit.errors import UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.linears import Linear
from sparsekit.models.roles import FAMILIES, MLP, FamilySpec, family
from sparsekit.models.structure import Stack

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Place:
    """A site in a block.

    Attributes:
        site: What it is.
        module: Whose input or output it is.
        reader: The linear that multiplies it; `down` for a gate.
        gate: Gate sites: name of the linear whose outputs are activated.
    """

    site: Site
    module: nn.Module
    reader: Linear
    gate: str | None = None


def input_places(model: Any, stack: Stack, index: int) -> list[Place]:
    """Return the inputs of a block's linears; experts, whose inputs no module sees, are not among them."""
    spec = FAMILIES.get(str(model.config.model_type))
    prefix = f"{stack.prefix(index)}."
    return [
        Place(
            Site(info.name, "input", index, info.in_features, (info,), _role(spec, info.name.removeprefix(prefix))),
            linear.module,
            linear,
        )
        for linear in stack.linears(index)
        for info in (linear.info,)
        if linear.expert is None
    ]


def gate_places(model: Any, stack: Stack, index: int) -> list[Place]:
    """Return the activated gates of a block's MLPs.

    Raises:
        UnsupportedFamily: The MLPs have no gate, or their activation is no module of its own.
    """
    spec = family(model)
    prefix = f"{stack.prefix(index)}."
    linears = {linear.name.removeprefix(prefix): linear for linear in stack.linears(index)}
    return [
        _gate_place(model, stack, index, mlp, linears, down)
        for mlp in spec.mlps
        for down in fnmatch.filter(linears, mlp.down)
    ]


def _gate_place(model: Any, stack: Stack, index: int, mlp: MLP, linears: dict[str, Linear], down: str) -> Place:
    prefix, name = stack.prefix(index), type(model).__name__
    if mlp.gate is None or linears[down].expert is not None:
        what = "has no gate" if mlp.gate is None else "is that of experts, whose gate no module sees"
        raise UnsupportedFamily(
            f"{name}: the MLP {what}",
            where=f"{prefix}.{down}",
            hint="Use a method that thins out inputs, such as teal or wina.",
        )
    path = down.rpartition(".")[0]
    activations = list(_activations(stack.blocks[index].get_submodule(path)))
    if len(activations) != 1:
        raise UnsupportedFamily(
            f"{name}: {len(activations)} activation modules in it, needed one",
            where=f"{prefix}.{path}",
            hint="Use a method that thins out inputs, such as teal or wina.",
        )
    (child, module), reader = activations[0], linears[down]
    fused = mlp.gate == mlp.up
    skips = (reader.info,) if fused else (linears[mlp.up].info, reader.info)
    site = Site(f"{prefix}.{path}.{child}", "gate", index, reader.info.in_features, skips, up=linears[mlp.up].name)
    return Place(site, module, reader, linears[mlp.gate].name)


def _activations(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children that are elementwise functions."""
    from transformers.activations import ACT2CLS

    known = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})
    for name, child in parent.named_children():
        if isinstance(child, known) or type(child).__module__ == torch.nn.modules.activation.__name__:
            yield name, child


def _role(spec: FamilySpec | None, name: str) -> str | None:
    """Return what a linear is, by its name in the block; the first that fits where several are fused."""
    if spec is None:
        return None
    a = spec.attention
    found = {"query": a.query, "key": a.key, "value": a.value, "output": a.output}
    for role, path in found.items():
        if path == name:
            return role
    for mlp in spec.mlps:
        for role, pattern in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            if pattern and fnmatch.fnmatchcase(name, pattern):
                return role
    return None


def in_order(places: Collection[Place], sequence: list[list[Linear]]) -> list[list[Place]]:
    """Return places in the order their signals appear; those of one tensor are together.

    Args:
        places: Of one block.
        sequence: Its linears in the order they run, see `OpenBlock.sequence`.
    """
    inputs = {place.site.name: place for place in places if place.site.kind == "input"}
    gates = {place.reader.name: place for place in places if place.site.kind == "gate"}
    steps = []
    for together in sequence:
        steps.append([gates[linear.name] for linear in together if linear.name in gates])
        steps.append([inputs[linear.name] for linear in together if linear.name in inputs])
    return [step for step in steps if step]
