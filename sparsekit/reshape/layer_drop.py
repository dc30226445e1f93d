"""Layer drop: whole blocks go, or the attention of some and the MLP of others.

What it does: chooses as many blocks as asked, by evolutionary search for what keeps the predictions of the whole model
    (`evopress`), by how little each block turns its input (`shortgpt`), or at random (the null); the others close ranks
    and make an ordinary, smaller checkpoint.
Source: Sieberling et al. 2024, "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search", arXiv
    2410.14649, section 4.1; Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv 2403.03853.
Shapes: n blocks -> n - k blocks, each as it was.
Cost: shortgpt one pass over the calibration text; evopress tokens as the options say, published k (n - k) / 1.5
    generations of 32 offspring on 2,048 and 2 of them on 32,768 tokens.
Deviations: the last stage is the same tokens in all generations, so the best never gets worse; the search begins at the
    best of some random choices and ShortGPT's; the first and the last block stay. No architecture has a place for a
    block without attention or without MLP: where only one goes its matrices are zeros, where both go the block does.
Numbers: 25 % of the blocks, WikiText-2, ShortGPT / EvoPress: Llama-3-8B 5527, 13.99; Llama-2-7B 23.41, 9.15.
    SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from random import Random
from typing import Literal

from pydantic import Field

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.contracts import Anatomy, LinearInfo, NewLinear, Probes, ReshapeContext, Reshaped, Reshaper, WholeModel
from sparsekit.errors import PlanError, SparsekitError
from sparsekit.lazy import torch
from sparsekit.models.layers import require_same_blocks, with_blocks
from sparsekit.models.roles import Part, family
from sparsekit.rng import derive
from sparsekit.search.conduct import Search
from sparsekit.search.landscape import DivergenceLandscape, Predictions, predictions
from sparsekit.search.options import SearchOptions
from sparsekit.search.swaps import Choice, Swaps
from sparsekit.search.verdict import verdict
from sparsekit.stats.cosine import Cosine


class LayerDropOptions(SearchOptions):
    """Options of `layer_drop`; those of a search are for `choose: evopress`."""

    drop: float = Field(default=0.25, gt=0, lt=1, description="share of the blocks that go, rounded half up")
    choose: Literal["evopress", "shortgpt", "random"] = Field(default="evopress", description="how they are chosen")
    unit: Literal["block", "branch"] = Field(
        default="block", description="block: whole blocks; branch: attention and MLP apart, the same share of each"
    )
    keep_first: int = Field(default=1, ge=0, description="blocks at the beginning that stay")
    keep_last: int = Field(default=1, ge=0, description="blocks at the end that stay")
    swaps: int = Field(default=3, ge=1, description="most exchanges between a parent and its offspring")
    starts: int = Field(default=64, ge=0, description="random choices that the search may begin at, beside ShortGPT's")
    generations: int = Field(default=120, ge=1, description="most generations; published: k (n - k) / 1.5")


class LayerDrop(Reshaper[LayerDropOptions]):
    """Leave out the blocks that the model misses least."""

    options_type = LayerDropOptions
    keeps_zeros = True

    def __init__(self, options: LayerDropOptions, seed: int) -> None:
        """A random choice looks at nothing."""
        super().__init__(options, seed)
        self.needs = frozenset() if options.choose == "random" else frozenset({"cosine"})  # type: ignore[misc]

    def check(self, anatomy: Anatomy) -> None:
        """Refuse more blocks than may go, and architectures in which blocks cannot move up."""
        options = self.options
        if anatomy.shapes.chained:
            raise PlanError(
                "shortcuts carry the residual stream from block to block, each into the basis of the next: none can go",
                hint="Drop blocks first and slice afterwards, or slice with rotation: global.",
            )
        count, free = self._count(anatomy), anatomy.blocks - options.keep_first - options.keep_last
        if not 0 < count <= free:
            raise PlanError(
                f"{options.drop:g} of {anatomy.blocks} blocks is {count}; {max(free, 0)} may go, since the first "
                f"{options.keep_first} and the last {options.keep_last} stay",
                where="drop",
                hint="Change drop, or keep_first and keep_last.",
            )
        if options.unit == "branch":
            if options.choose == "shortgpt":
                raise PlanError("shortgpt measures whole blocks", where="unit", hint="Set unit: block, or choose.")
            family(anatomy.model)
            return
        last = anatomy.blocks - options.keep_last
        self._config(anatomy, [block for block in range(anatomy.blocks) if not last - count <= block < last])

    def probes(self) -> Probes | None:
        """Return the part of the calibration text that choices are compared on."""
        return self.options.probes(2) if self.options.choose == "evopress" else None

    def plan(self, context: ReshapeContext) -> dict[str, JSON]:
        """Choose what goes: `attention` and `mlp` are the blocks that lose it, the same ones where blocks go."""
        anatomy = context.anatomy
        swaps = self._swaps(anatomy)
        if self.options.choose == "random":
            going = swaps.draw(Random(derive(self.seed, "layer_drop")))  # noqa: S311  (a null, no secret)
        else:
            shortgpt = self._shortgpt(context, swaps)
            going = shortgpt if self.options.choose == "shortgpt" else self._search(context, swaps, shortgpt)
        attention, mlp = _lost(going, anatomy.blocks)
        return {"attention": sorted(attention), "mlp": sorted(mlp)}

    def apply(self, anatomy: Anatomy, plan: Mapping[str, JSON], folder: object = None) -> Reshaped:
        """Leave out the blocks that lose both parts; the other part's matrices become zeros."""
        attention, mlp = set(_numbers(plan["attention"])), set(_numbers(plan["mlp"]))
        kept = [block for block in range(anatomy.blocks) if block not in attention & mlp]
        return Reshaped(
            tuple(kept),
            self._config(anatomy, kept),
            anatomy.shapes.of_blocks(kept, anatomy.blocks),
            lambda block: _silenced(anatomy, block, attention=block in attention, mlp=block in mlp),
        )

    def null(self, name: str) -> LayerDropOptions | None:
        """`random`: as many blocks, each as likely as any other."""
        return self.options.model_copy(update={"choose": "random"}) if name == "random" else None

    def _count(self, anatomy: Anatomy) -> int:
        return int(self.options.drop * anatomy.blocks + 0.5)

    def _config(self, anatomy: Anatomy, kept: list[int]) -> dict[str, JSON]:
        changes = with_blocks(anatomy.model.config, kept)
        require_same_blocks(anatomy.model, changes, kept, anatomy.shapes.of_blocks(kept, anatomy.blocks))
        return changes

    def _swaps(self, anatomy: Anatomy) -> Swaps:
        """Return the choices there are: a part for each block, or two, all attentions and then all MLPs."""
        free = tuple(range(self.options.keep_first, anatomy.blocks - self.options.keep_last))
        if self.options.unit == "block":
            return Swaps(anatomy.blocks, (free,), self._count(anatomy), self.options.swaps)
        kinds = (free, tuple(anatomy.blocks + block for block in free))
        return Swaps(2 * anatomy.blocks, kinds, self._count(anatomy), self.options.swaps)

    def _shortgpt(self, context: ReshapeContext, swaps: Swaps) -> Choice:
        """Return the blocks whose outputs are most like their inputs; of branches, both of each block."""
        influence = []
        for block, stat in enumerate(context.flows("cosine")):
            assert isinstance(stat, Cosine)  # noqa: S101  (what was asked for)
            influence.append(stat.influence)
            context.facts.setdefault("influence", {})[str(block)] = stat.influence
        return swaps.least(influence * (swaps.parts // len(influence)))

    def _search(self, context: ReshapeContext, swaps: Swaps, shortgpt: Choice) -> Choice:
        """Return the best choice of an evolutionary search."""
        if swaps.rigid:
            context.reporter.note("search: there is only one choice of what goes")
            return shortgpt
        if context.folder is None:
            raise SparsekitError("a search needs a folder for its state")
        began = time.perf_counter()
        with context.whole() as model:
            dense = predictions(model, self.options, context.reporter)
            landscape = DropLandscape(context.anatomy, model, dense)
            search = Search(
                self.options,
                landscape,
                dense.tokens_per_second,
                context.reporter,
                self.seed,
                context.folder,
                context.identity,
            )
            schedule = search.schedule(time.perf_counter() - began, 2)
            start = search.begun or self._start(swaps, shortgpt, landscape)
            base = search.fitness(shortgpt, schedule)
            best, spent = search.evolve(start, swaps.mutate, schedule, "shortgpt", base)
            found = {
                "evopress": search.fitness(best, schedule),
                "shortgpt": base,
                "random_search": search.random(swaps.draw, schedule, spent)[1],
            }
            landscape.leave()
        context.facts["fitness_by_generation"] = search.history
        context.facts["fitness"] = found
        context.facts["generations"] = {"all": float(schedule.generations)}
        context.facts["tokens_searched"] = {"all": float(spent * self.options.sequence_length)}
        context.reporter.note(f"search: {verdict('evopress', found)}")
        return best

    def _start(self, swaps: Swaps, shortgpt: Choice, landscape: DropLandscape) -> Choice:
        """Return the best of ShortGPT's and some random choices, on the tokens of the first stage."""
        random = Random(derive(self.seed, "starts"))  # noqa: S311  (a search, no secret)
        starts = [shortgpt, *(swaps.draw(random) for _ in range(self.options.starts))]
        schedule = self.options.schedule()
        draw = random.sample(range(schedule.pool), schedule.stages[0].samples)
        fitness = landscape.fitness(starts, draw)
        return starts[min(range(len(starts)), key=lambda place: fitness[place])]


class DropLandscape(DivergenceLandscape[Choice]):
    """Divergence of the model without some of its parts."""

    def __init__(self, anatomy: Anatomy, model: WholeModel, dense: Predictions) -> None:
        """Begin at the whole model."""
        super().__init__(model, dense)
        self._anatomy = anatomy

    def enter(self, state: Choice) -> None:
        """Pass over the blocks that lose all, silence the parts of the others."""
        attention, mlp = _lost(state, self._anatomy.blocks)
        parts: tuple[tuple[Part, set[int]], ...] = (("attention", attention - mlp), ("mlp", mlp - attention))
        silent = [
            linear
            for part, lost in parts
            for block in lost
            for linear, writes in _branch(self._anatomy, block, part)
            if writes
        ]
        self._model.omit(attention & mlp, silent)

    def leave(self) -> None:
        """Put all parts back."""
        self._model.omit(())


def _lost(state: Choice, blocks: int) -> tuple[set[int], set[int]]:
    """Return the blocks that lose attention and those that lose the MLP: a half of the state each, or all of it."""
    attention, mlp = state[:blocks], state[-blocks:]
    return {block for block in range(blocks) if attention[block]}, {block for block in range(blocks) if mlp[block]}


def _branch(anatomy: Anatomy, block: int, part: Part) -> list[tuple[LinearInfo, bool]]:
    """Return the linears of a block's attention or MLP, and whether each writes to the residual stream."""
    prefix = f"{anatomy.prefix}.{block}."
    linears = {linear.name.removeprefix(prefix): linear for linear in anatomy.linears if linear.block == block}
    found = family(anatomy.model).branch(part, linears)
    return [(linears[name], writes) for name, writes in found.items()]


def _silenced(anatomy: Anatomy, block: int, *, attention: bool, mlp: bool) -> dict[str, NewLinear]:
    """Return zeros for all linears of the parts that a block loses."""
    parts: tuple[tuple[Part, bool], ...] = (("attention", attention), ("mlp", mlp))
    return {
        linear.name: NewLinear(
            torch.zeros(linear.out_features, linear.in_features), torch.zeros(linear.out_features) if writes else None
        )
        for part, lost in parts
        if lost
        for linear, writes in _branch(anatomy, block, part)
    }


def _numbers(value: JSON) -> list[int]:
    assert isinstance(value, list)  # noqa: S101  (a plan that `plan` has made)
    return [int(number) for number in value if isinstance(number, int)]
