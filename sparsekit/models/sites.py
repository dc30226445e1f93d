"""The signals of a block that can be thinned out: inputs of linears, activated gates and neurons of MLPs."""

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
        module: Whose input or output it is; of experts the module that holds them all.
        readers: The linear that multiplies it, `down` for a gate; of experts one linear for each.
    """

    site: Site
    module: nn.Module
    readers: tuple[Linear, ...]

    @property
    def experts(self) -> str | None:
        """Parameter that holds the weights of all experts, None for an ordinary linear."""
        return None if self.readers[0].expert is None else self.readers[0].parameter


def input_places(model: Any, stack: Stack, index: int) -> list[Place]:
    """Return the inputs of a block's linears; those of all experts' projections of one kind are one."""
    spec = FAMILIES.get(str(model.config.model_type))
    prefix = f"{stack.prefix(index)}."
    found: dict[str, list[Linear]] = {}
    for linear in stack.linears(index):
        found.setdefault(linear.name if linear.expert is None else linear.parameter_name, []).append(linear)
    return [
        Place(
            Site(
                name,
                "input",
                index,
                readers[0].info.in_features,
                tuple(reader.info for reader in readers),
                _role(spec, readers[0].name.removeprefix(prefix)),
            ),
            readers[0].module,
            tuple(readers),
        )
        for name, readers in found.items()
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


def neuron_places(model: Any, stack: Stack, index: int) -> list[Place]:
    """Return what the down projections of a block's MLPs multiply, as neurons that can go with all their weights.

    Raises:
        UnsupportedFamily: The block's MLPs are experts, or not as the roles of its family say.
    """
    spec, prefix = family(model), f"{stack.prefix(index)}."
    linears = {linear.name.removeprefix(prefix): linear for linear in stack.linears(index)}
    found = {down: makers for down in linears if (makers := neuron_makers(spec, down))}
    if any(linear.expert is not None for linear in linears.values()) or not found:
        raise UnsupportedFamily(
            f"{type(model).__name__}: its MLPs are experts, of which each token uses others",
            where=prefix.removesuffix("."),
            hint="Use a method that thins out inputs, such as teal or wina.",
        )
    places = []
    for down, makers in found.items():
        reader = linears[down]
        width = reader.info.in_features
        for maker, rows in makers:
            if maker not in linears or linears[maker].info.out_features != rows * width:
                raise UnsupportedFamily(f"its {width} neurons are not the outputs of {maker}", where=reader.name)
        skips = (*(linears[maker].info for maker, _ in makers), reader.info)
        places.append(Place(Site(reader.name, "neurons", index, width, skips, "down"), reader.module, (reader,)))
    return places


def neuron_makers(spec: FamilySpec, down: str) -> tuple[tuple[str, int], ...]:
    """Return the linears that make the inputs of a down projection of a plain MLP, all names relative to the block.

    Returns:
        (name, rows for a neuron), the second row of a neuron as far from the first as there are neurons; nothing if
        `down` is no such projection.
    """
    for mlp in spec.mlps:
        if mlp.down == down and "*" not in down and mlp.rows != "pairs":
            return ((mlp.up, 2),) if mlp.rows == "halves" else tuple((name, 1) for name in (mlp.gate, mlp.up) if name)
    return ()


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
    return Place(site, module, (reader,))


def _activations(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children that are elementwise functions."""
    return ((name, child) for name, child in parent.named_children() if is_activation(child))


def is_activation(module: nn.Module) -> bool:
    """Tell an elementwise function."""
    from transformers.activations import ACT2CLS

    known = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})
    return isinstance(module, known) or type(module).__module__ == torch.nn.modules.activation.__name__


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
    by_reader = {reader.name: place for place in places for reader in place.readers if place.site.kind != "gate"}
    gates = {place.readers[0].name: place for place in places if place.site.kind == "gate"}
    steps: list[list[Place]] = []
    seen: set[str] = set()
    for together in sequence:
        for known in (gates, by_reader):
            step = [known[linear.name] for linear in together if linear.name in known]
            fresh = [place for place in step if place.site.name not in seen]  # experts come one after the other
            seen |= {place.site.name for place in fresh}
            steps.append(fresh)
    return [step for step in steps if step]
