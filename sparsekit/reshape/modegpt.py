"""MoDeGPT: fewer neurons and fewer channels of heads, by matrix decompositions of what two linears compute together.

What it does: keeps the neurons that can stand in for the others and refits what reads them (Nystrom), keeps the pairs
    of channels that queries and keys meet in most (CR), and turns values into the directions through which most of them
    is seen behind the attention (SVD). Blocks change one after the other, each sees what those before it have become.
Source: Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression", arXiv 2408.09632,
    algorithms 1 to 3, section 3.3 for the shares of the blocks.
Shapes: down projection [hidden, neurons] -> fewer inputs; query, key, value linears [heads x size, hidden] and the
    output linear -> fewer channels, as many in all heads of a block.
Cost: three passes over a block; one solve of neurons^3 and, per group of heads, decompositions of size^3.
Deviations: queries and keys keep as many channels as values, and all heads of a block the same pairs, since attention
    modules have one size of heads and one set of angles. The ridge is a share of the gram matrix's mean diagonal, 1 in
    the paper, and damps the refit too. By default only neurons go, as many in every block: see docs/results.md.
Numbers: 90 to 95 % of the dense zero-shot accuracy at 25 to 30 % (abstract). SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from sparsekit import fs, ranks
from sparsekit.budget import above_zero, distribute, exact
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import Widths
from sparsekit.contracts import (
    Anatomy,
    Kept,
    LinearInfo,
    MethodOptions,
    NewLinear,
    OpenBlock,
    ReshapeContext,
    Reshaped,
    Reshaper,
)
from sparsekit.errors import PlanError, SparsekitError
from sparsekit.models.block import Block
from sparsekit.models.block_files import read_block, write_block
from sparsekit.models.inside import Inside
from sparsekit.models.shapes import parameters, plainly
from sparsekit.models.structure import find_stack
from sparsekit.models.widths import silence_rest
from sparsekit.solve.heads import narrow_heads
from sparsekit.solve.modular import SecondMoments, nystrom
from sparsekit.stats.cosine import Cosine
from sparsekit.stats.gram import Gram
from sparsekit.stats.moments import Moments

if TYPE_CHECKING:
    from torch import Tensor

_CAP = 0.8
"""Share of its neurons or channels that a block loses at most, where blocks lose different shares."""
_RECORD_BYTES = 1 << 24


class MoDeGPTOptions(MethodOptions):
    """Options of `modegpt`: `width` or `params`, not both."""

    width: float | None = Field(default=None, ge=0, lt=1, description="share of the neurons and channels that goes")
    params: float | None = Field(
        default=None, ge=0, lt=1, description="share of all parameters of the model that goes; 0.2 without width"
    )
    parts: Literal["mlp", "all"] = Field(default="mlp", description="neurons alone, or channels of heads too")
    allocate: Literal["uniform", "influence"] = Field(
        default="uniform", description="the same share of every block, or more where a block turns its input less"
    )
    eps: float = Field(default=0.1, gt=0, description="influence: the larger, the more alike are the shares")
    multiple: int = Field(default=8, ge=1, description="neurons go in multiples of this")
    head_multiple: int = Field(default=4, ge=2, multiple_of=2, description="channels of a head go in multiples of this")
    damping: float = Field(default=0.1, gt=0, le=0.3, description="added to the diagonal, as a share of its mean")
    allow_growth: bool = Field(default=False, description="accept a model that has no fewer parameters")

    @model_validator(mode="after")
    def _one_amount(self) -> MoDeGPTOptions:
        if self.width is not None and self.params is not None:
            raise ValueError("width and params are given; need one of them")
        return self


class MoDeGPT(Reshaper[MoDeGPTOptions]):
    """Make the MLPs and attentions of all blocks narrower inside."""

    options_type = MoDeGPTOptions

    def __init__(self, options: MoDeGPTOptions, seed: int) -> None:
        """Shares that differ need what flows through the blocks."""
        super().__init__(options, seed)
        flows = {"cosine"} if options.allocate == "influence" else set()
        self.needs = frozenset({"gram", "moments", *flows})  # type: ignore[misc]

    @property
    def grows(self) -> bool:
        """Whether the user accepts a model of no fewer parameters."""
        return self.options.allow_growth

    def check(self, anatomy: Anatomy) -> None:
        """Refuse families that cannot be narrowed so, and amounts that leave nothing of a block."""
        self._gone(anatomy, self._inside(anatomy))

    def tokens(self, anatomy: Anatomy) -> int:
        """Return as many tokens as a block has neurons: fewer make some of them look like sums of others."""
        return self._inside(anatomy).neurons

    def outline(self, anatomy: Anatomy) -> Reshaped:
        """Return the result were all blocks to lose the same: its parameters are those of any result."""
        inside, blocks = self._inside(anatomy), range(anatomy.blocks)
        shapes = anatomy.shapes.narrowed([inside.without(*self._gone(anatomy, inside))] * len(blocks))
        config, shapes = plainly(anatomy.model, shapes) if self.options.allocate == "uniform" else ({}, shapes)
        return Reshaped(tuple(blocks), config, shapes)

    def null(self, name: str) -> MoDeGPTOptions | None:
        """`uniform`: the same share of every block."""
        return self.options.model_copy(update={"allocate": "uniform"}) if name == "uniform" else None

    def plan(self, context: ReshapeContext) -> dict[str, JSON]:
        """Decompose block after block; what is made of each stands in a file of the context's folder."""
        anatomy = context.anatomy
        inside = self._inside(anatomy)
        neurons, channels = self._gone(anatomy, inside)
        shares = self._shares(context)
        kept = {
            "neurons": _spread(shares, inside.neurons, neurons, self.options.multiple),
            "channels": _spread(shares, inside.channels, channels, self.options.head_multiple),
        }
        for kind, counts in kept.items():
            if counts:
                context.facts[kind] = {block: float(count) for block, count in counts.items()}
        files, rotary = self._walk(context, inside, kept)
        return {**{kind: dict(counts) for kind, counts in kept.items()}, "rotary": rotary, "files": files}

    def apply(self, anatomy: Anatomy, plan: Mapping[str, JSON], folder: Path | None) -> Reshaped:
        """Cut every block to its widths, with the linears that were solved again from the files."""
        assert folder is not None  # noqa: S101  (`plan` has kept files in it)
        neurons, channels, rotary, files = (_mapping(plan[key]) for key in ("neurons", "channels", "rotary", "files"))
        read = partial(read_block, folder / "blocks", files=files)
        blocks = range(anatomy.blocks)
        widths = [_widths(*(found.get(str(block)) for found in (neurons, channels, rotary))) for block in blocks]
        config, shapes = plainly(anatomy.model, anatomy.shapes.narrowed(widths))
        return Reshaped(
            tuple(blocks), config, shapes, lambda block: _linears(read(block)), lambda block: _kept(read(block))
        )

    def _walk(
        self, context: ReshapeContext, inside: Inside, counts: Mapping[str, Mapping[str, int]]
    ) -> tuple[dict[str, JSON], dict[str, JSON]]:
        """Decompose block after block; return the sha256 of its file, and its pairs of channels, by block."""
        if context.folder is None:
            raise SparsekitError("what is made of the blocks needs a folder")
        folder, record, model = context.folder / "blocks", context.folder / "blocks.json", context.anatomy.model
        identity = jsonio.digest({**context.identity, "counts": {kind: dict(each) for kind, each in counts.items()}})
        files = ranks.share(partial(_finished, record, identity))
        rotary: dict[str, JSON] = {}
        stack = find_stack(model)
        for opened in context.blocks():
            key = str(opened.index)
            if key not in files:
                wanted = [counts[kind].get(key) for kind in ("neurons", "channels")]
                found = self._decompose(context, opened, *wanted)
                files[key] = ranks.share(partial(write_block, folder, opened.index, found))
                content = jsonio.canonical({"identity": identity, "files": files})
                ranks.share(partial(fs.replace_file, record, content))
            else:
                found = ranks.share(partial(read_block, folder, opened.index, files))
                silence_rest(model, stack, opened.index, _kept(found), _linears(found))
            if "channels" in found and inside.paired:
                rotary[key] = found["channels"][: len(found["channels"]) // 2].tolist()
        return files, rotary

    def _decompose(
        self, context: ReshapeContext, opened: OpenBlock, neurons: int | None, channels: int | None
    ) -> dict[str, Tensor]:
        """Give a loaded block so many neurons and channels (None: all), and return what its file says."""
        model, stack = context.anatomy.model, find_stack(context.anatomy.model)
        block = Block.of(model, stack, opened.index)
        tensors: dict[str, Tensor] = {}

        def put(found: dict[str, Tensor]) -> None:
            silence_rest(model, stack, opened.index, _kept(found), _linears(found))
            tensors.update(found)

        if channels is not None:
            query = block.named[block.spec.attention.query]
            stats = opened.collect([query], frozenset({"gram", "moments"}))[query.name]
            put(ranks.share(partial(narrow_heads, block, _moments(stats), channels)))
        if neurons is not None:
            down = block.named[block.down]
            gram = opened.collect([down], frozenset({"gram"}))[down.name]["gram"]
            assert isinstance(gram, Gram)  # noqa: S101  (what was asked for)
            weight = down.weight()
            kept, fitted = ranks.share(
                lambda: nystrom(weight.float(), gram.matrix, neurons, self.options.damping)  # the others get copies
            )
            put({"neurons": kept, f"{down.name}.weight": fitted.to(weight.dtype)})
        return tensors

    def _shares(self, context: ReshapeContext) -> dict[str, float]:
        """Return the share of each block that goes, up to a common factor, by its number."""
        blocks = range(context.anatomy.blocks)
        if self.options.allocate == "uniform":
            return {str(block): 1.0 for block in blocks}
        influence = {}
        for block, stat in enumerate(context.flows("cosine")):
            assert isinstance(stat, Cosine)  # noqa: S101  (what was asked for)
            influence[str(block)] = stat.influence
        context.facts["influence"] = influence
        least = min(influence.values())
        return above_zero({block: math.exp((least - value) / self.options.eps) for block, value in influence.items()})

    def _inside(self, anatomy: Anatomy) -> Inside:
        return Inside.of(anatomy.model, heads=self.options.parts == "all")

    def _gone(self, anatomy: Anatomy, inside: Inside) -> tuple[int, int]:
        """Return how many neurons, and channels of each head, a block loses, on average over the blocks.

        Raises:
            PlanError: Nothing would be left.
        """
        options = self.options
        if options.width is None:
            gone = self._gone_of_params(anatomy, inside, 0.2 if options.params is None else options.params)
        else:
            share = exact(options.width)
            neurons = round(share * inside.neurons / options.multiple) * options.multiple
            gone = neurons, round(share * inside.channels / options.head_multiple) * options.head_multiple
        said = f"{gone[0]} of {inside.neurons} neurons"
        if inside.channels:
            said += f" and {gone[1]} of {inside.channels} channels"
        if gone[0] >= inside.neurons or gone[1] >= max(inside.channels, 1):
            raise PlanError(
                f"{said} would go",
                where="params" if options.width is None else "width",
                hint="Let less go, or parts: all." if options.parts == "mlp" else "Let less go.",
            )
        if options.allocate == "influence" and max(gone[0], 0) > _CAP * inside.neurons:
            raise PlanError(
                f"{said} would go on average, a block loses {_CAP:.0%} of them at most",
                where="allocate",
                hint="Set allocate: uniform, or let less go.",
            )
        return gone

    def _gone_of_params(self, anatomy: Anatomy, inside: Inside, share: float) -> tuple[int, int]:
        """Return the least neurons and channels, alike in share, that hold a share of all parameters."""
        options = self.options
        wanted = math.ceil(exact(share) * parameters(anatomy.model))
        neuron, *channel = inside.worth(anatomy.model, anatomy.shapes)
        all_channels = sum(channel) * inside.channels
        part = Fraction(wanted, neuron * inside.neurons + all_channels)
        channels = round(part * inside.channels / options.head_multiple) * options.head_multiple
        left = max(wanted - sum(channel) * channels, 0)
        return math.ceil(Fraction(left, neuron * options.multiple)) * options.multiple, channels


def _spread(shares: Mapping[str, float], count: int, gone: int, unit: int) -> dict[str, int]:
    """Return how many of the `count` neurons or channels of each block stay; nothing where none go."""
    if not gone:
        return {}
    blocks = [LinearInfo(block, int(block), 1, count) for block in shares]
    cap = _CAP if len(set(shares.values())) > 1 else 1.0
    lost = distribute(blocks, shares, gone * len(blocks), unit, max_density=cap)
    return {block: count - lost[block] for block in shares}


def _moments(stats: Mapping[str, object]) -> SecondMoments:
    gram, moments = stats["gram"], stats["moments"]
    assert isinstance(gram, Gram)  # noqa: S101  (what was asked for)
    assert isinstance(moments, Moments)  # noqa: S101  (what was asked for)
    return SecondMoments(gram.matrix / gram.tokens, moments.mean)


def _widths(neurons: int | None, channels: int | None, rotary: Any) -> Widths:
    return Widths(None, neurons, channels, tuple(rotary) if channels is not None and rotary is not None else None)


def _kept(tensors: Mapping[str, Tensor]) -> Kept:
    return Kept(None, tensors.get("neurons"), tensors.get("channels"))


def _linears(tensors: Mapping[str, Tensor]) -> dict[str, NewLinear]:
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return {name: NewLinear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in names}


def _finished(record: Path, identity: str) -> dict[str, JSON]:
    """Return the files that an interrupted run has finished, of the same model, text and options."""
    if not record.exists():
        return {}
    _, found = jsonio.read(record, limit_bytes=_RECORD_BYTES)
    return _mapping(found["files"]) if isinstance(found, dict) and found.get("identity") == identity else {}


def _mapping(value: JSON) -> dict[str, Any]:
    assert isinstance(value, dict)  # noqa: S101  (what this code has written)
    return value
