"""Blocks whose sums of residual stream and branch go through a matrix, the shortcut, from one width to the next.

Such a block is an object of a subclass of its architecture's class. Its forward is the one below for all families:
norms, attention and MLP are the architecture's own modules, called with the arguments that the block was called with.
What a family does besides, such as dropout or a factor, is in the table of roles; tests hold every family with
identities as shortcuts to its own forward.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from sparsekit.errors import UnsupportedFamily
from sparsekit.models.residual import is_parallel
from sparsekit.models.roles import FamilySpec, Sums, family
from sparsekit.models.structure import SHORTCUTS


class Shortcut(nn.Module):
    """Carries the residual stream past a branch. No linear, so that nothing takes it for something to prune.

    Attributes:
        weight: [width behind, width in front].
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, stream: Tensor) -> Tensor:
        """Return the stream [..., width behind] from one [..., width in front]."""
        return nn.functional.linear(stream, self.weight)

    def extra_repr(self) -> str:
        """Return the widths."""
        behind, here = self.weight.shape
        return f"{here} -> {behind}"


@dataclass(frozen=True)
class Wiring:
    """How a block computes; names are relative to it.

    Attributes:
        attention, mlp: Modules; an `mlp` of several names is called one after the other.
        attention_norm, mlp_norm: What they read through; of one name where both read the same.
        parallel: They read the same stream, and are added to it together.
        sums: How they are added.
    """

    attention: str
    mlp: tuple[str, ...]
    attention_norm: str
    mlp_norm: str
    parallel: bool
    sums: Sums

    @classmethod
    def of(cls, model: Any, block: nn.Module) -> Wiring:
        """Return the wiring of a block.

        Raises:
            UnsupportedFamily: Its sums cannot be replaced; says why.
        """
        spec = family(model)
        if spec.sums.closed:
            raise UnsupportedFamily(
                f"blocks of {type(model).__name__} cannot have shortcuts: {spec.sums.closed}",
                hint="Slice with rotation: global, which needs none.",
            )
        parallel, norm = is_parallel(model, spec), spec.mlp_norm
        if parallel and norm is not None and getattr(block, norm, None) is None:
            norm = spec.attention_norm
        attention = spec.attention.output.rpartition(".")[0]
        found = cls(attention, _mlp(spec), str(spec.attention_norm), str(norm), parallel, spec.sums)
        known = {attention, *found.mlp, found.attention_norm, found.mlp_norm, *spec.sums.dropouts, SHORTCUTS}
        if unknown := [name for name, _ in block.named_children() if name not in known]:
            raise UnsupportedFamily(
                f"blocks of {type(model).__name__} cannot have shortcuts: they have {unknown[0]} too"
            )
        return found


def add_shortcuts(model: Any, block: Any, widths: tuple[int, ...]) -> None:
    """Let a block compute with shortcuts, whose values are those of uninitialised memory, or on meta.

    Args:
        model: A transformers model.
        block: One of its blocks.
        widths: Of the stream at its places, and at the next one behind it.

    Raises:
        UnsupportedFamily: Its sums cannot be replaced; says why.
    """
    wiring = Wiring.of(model, block)
    like = next(block.parameters())
    shapes = [(behind, here) for here, behind in itertools.pairwise(widths)]
    weights = [nn.Parameter(like.data.new_empty(shape), requires_grad=like.requires_grad) for shape in shapes]
    block.add_module(SHORTCUTS, nn.ModuleList(map(Shortcut, weights)))
    stock: Any = type(block)
    block.__class__ = _wired(stock, wiring)


@cache
def _wired(stock: Any, wiring: Wiring) -> Any:
    """Return the class of a block with shortcuts: one for each class and wiring, and of the same name."""
    _, _, *others = inspect.signature(stock.forward).parameters.values()  # behind self and the hidden states
    names = [parameter.name for parameter in others if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    defaults = {parameter.name: parameter.default for parameter in others if parameter.default is not parameter.empty}

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        return _forward(self, wiring, hidden_states, given)

    about = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (stock,), {"forward": forward, **about})


def _forward(block: Any, wiring: Wiring, stream: Tensor, given: dict[str, Any]) -> Tensor:
    """Return what leaves a block, [..., width behind it].

    Args:
        block: A block with shortcuts.
        wiring: How it computes.
        stream: What enters it, [..., width].
        given: Its other arguments, which are its attention's.
    """
    shortcuts = block.shortcuts
    read = getattr(block, wiring.attention_norm)(stream)
    attention, *_ = getattr(block, wiring.attention)(read, **given)
    attention = _ending(block, wiring.sums, 0, attention)
    if not wiring.parallel:
        stream = shortcuts[0](stream) + attention
    if wiring.mlp_norm != wiring.attention_norm:
        read = getattr(block, wiring.mlp_norm)(stream)
    for name in wiring.mlp:
        read = getattr(block, name)(read)
    mlp = _ending(block, wiring.sums, 1, read if isinstance(read, Tensor) else read[0])
    out: Tensor = shortcuts[0](stream) + (attention + mlp) if wiring.parallel else shortcuts[1](stream) + mlp
    return out


def _ending(block: Any, sums: Sums, branch: int, out: Tensor) -> Tensor:
    """Return what of a branch's output is added to the stream."""
    if name := sums.dropouts[branch]:
        dropout = getattr(block, name)
        out = dropout(out) if callable(dropout) else nn.functional.dropout(out, dropout, block.training)
    return out * getattr(block, sums.factor) if sums.factor else out


def _mlp(spec: FamilySpec) -> tuple[str, ...]:
    tops = {mlp.down.partition(".")[0] for mlp in spec.mlps}
    (mlp, *_) = spec.mlps
    return tuple(tops) if "." in mlp.down else (mlp.up, spec.sums.activation, mlp.down)
