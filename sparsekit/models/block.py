"""A block by the names that its family's roles use, and what of its attention can become narrower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.errors import UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.feeds import Feed, feeds, head_size
from sparsekit.models.linears import Linear
from sparsekit.models.roles import FamilySpec, family
from sparsekit.models.structure import Stack

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A block by the names that its family's roles use, relative to it.

    Attributes:
        spec: The roles.
        prefix: Dotted name of the block, with a dot at the end.
        attention: The module that holds the attention's linears.
        named: All linears of the block.
        feeds: What makes the inputs of those that something in the block makes.
    """

    spec: FamilySpec
    prefix: str
    attention: nn.Module
    named: Mapping[str, Linear]
    feeds: Mapping[str, Feed]

    @classmethod
    def of(cls, model: Any, stack: Stack, index: int) -> Block:
        """Return a block of a transformers model; its parameters may be on meta.

        Raises:
            UnsupportedFamily: The roles of its family are not known, or it is not as they say.
        """
        spec, prefix, linears = family(model), f"{stack.prefix(index)}.", stack.linears(index)
        attention = stack.blocks[index].get_submodule(spec.attention.output.rpartition(".")[0])
        # A block whose heads have lost channels says so; the configuration does not.
        size = getattr(attention, "head_dim", None)
        found = feeds(spec, model.config, linears, stack.prefix(index), size if isinstance(size, int) else None)
        named = {linear.name.removeprefix(prefix): linear for linear in linears}
        return cls(spec, prefix, attention, named, {name.removeprefix(prefix): feed for name, feed in found.items()})

    def heads(self, what: str = "heads") -> Feed:
        """Return the feed of the linear behind the heads, if queries, keys and values are linears of whole heads.

        Args:
            what: What is to be removed, for the error.

        Raises:
            UnsupportedFamily: They are not; says why.
        """
        roles = self.spec.attention
        output = self.prefix + roles.output
        if roles.rows != "whole":
            raise UnsupportedFamily(
                f"{what} cannot be removed: queries, keys and values are one linear, {roles.query}", where=output
            )
        known = (roles.query, roles.key, roles.value, roles.output, *roles.head_norms)
        path = roles.output.rpartition(".")[0]
        for name, parameter in self.attention.named_parameters():
            if not f"{path}.{name}".startswith(tuple(f"{part}." for part in known)):
                raise UnsupportedFamily(
                    f"{what} cannot be removed: {path}.{name} {list(parameter.shape)} goes with all of them",
                    where=output,
                )
        feed = self.feeds[roles.output]
        needed = {roles.query: feed.sets.numel(), roles.key: feed.makers[0][0].info.out_features}
        for name, outputs in needed.items():
            if name not in self.named or self.named[name].info.out_features != outputs:
                got = f"has {self.named[name].info.out_features} outputs" if name in self.named else "is not there"
                raise UnsupportedFamily(f"{what} cannot be removed: {name} {got}, needed {outputs}", where=output)
        return feed

    def head_rows(self) -> tuple[Tensor, Tensor]:
        """Return the rows of the query and of the key and value linears by head.

        [groups, copies, size] and [groups, size], int64.

        Raises:
            UnsupportedFamily: As `heads`.
        """
        feed = self.heads()
        (_, values), *_ = feed.makers
        return feed.sets, values.reshape(feed.sets.shape)[:, 0]  # one copy of what many heads read

    @property
    def down(self) -> str:
        """Name of the one down projection.

        Raises:
            UnsupportedFamily: There are several.
        """
        found = [name for name in self.feeds if name != self.spec.attention.output]
        if len(found) > 1:
            raise UnsupportedFamily(
                f"neurons cannot be removed: the block has {len(found)} MLPs, experts or beside experts",
                where=self.prefix + found[0],
            )
        return found[0]


def require_channels(model: Any, block: Block) -> None:
    """Require that the heads of a block can have fewer channels.

    Raises:
        UnsupportedFamily: says why not.
    """
    what, spec = "channels of heads", block.spec.attention
    size = block.heads(what).sets.shape[-1]
    present = {name for name, _ in block.attention.named_modules()}
    reason = None
    if found := [norm for norm in spec.head_norms if norm.rpartition(".")[2] in present]:
        reason = f"{' and '.join(found)} divide by what all of them are"
    elif spec.rotary is None:
        reason = "positions turn other pairs of them than channels half a head apart"
    elif spec.rotary == "halves":
        turned = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        if turned != {size}:
            reason = f"positions turn {', '.join(map(str, sorted(turned))) or 'none'} of {size}"
        if size != head_size(model.config):
            reason = f"some are gone already, {size} of {head_size(model.config)} are left"
    if reason:
        raise UnsupportedFamily(f"{what} cannot be removed: {reason}", where=block.prefix + spec.output)


def give_channels(block: Block, channels: Tensor) -> None:
    """Make the attention of a block, whose linears have so many channels a head, compute with them.

    Args:
        block: The block.
        channels: Which channels of the old heads they are, [kept] int64.
    """
    block.attention.head_dim = len(channels)  # type: ignore[assignment]  # a number, not a module
    if block.spec.attention.rotary == "halves":
        block.attention.register_forward_pre_hook(_Angles(channels), with_kwargs=True)


class _Angles:
    """Hands an attention the cosines and sines of the channels that its heads still have."""

    def __init__(self, channels: Tensor) -> None:
        self._channels = channels

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the attention, with a part of its `position_embeddings`."""
        angles = tuple(each[..., self._channels.to(each.device)] for each in kwargs["position_embeddings"])
        return args, {**kwargs, "position_embeddings": angles}


def pairs_to_channels(pairs: Tensor, size: int) -> Tensor:
    """Return the channels of pairs half a head apart, `pairs: [kept]`, in a head of `size`: [2 x kept] int64."""
    found: Tensor = torch.cat([pairs, pairs + size // 2])
    return found
