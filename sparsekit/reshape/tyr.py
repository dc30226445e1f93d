"""Tyr-the-Pruner: groups of heads and neurons go, how many in which block is searched on the whole model.

What it does: removes parts of each attention and MLP by structured OBS at several levels, refits what reads them, and
    exchanges steps between blocks, attention with attention and MLP with MLP, as long as the whole model comes closer
    to the dense one; then again around the result with half the step. What is left is a dense model with other widths
    in each block.
Source: Li et al. 2025, "Tyr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization", arXiv
    2503.09657. The search is that of EvoPress, Sieberling et al. 2024, arXiv 2410.14649, algorithm 1.
Shapes: output linear [hidden, heads x size], down projection [hidden, neurons] -> fewer inputs, other in each block.
Cost: for each pass one walk over the calibration text and about in^3 multiplications a linear and level; files of
    2 levels + 1 copies of these linears; tokens as the options say.
Deviations: the cost of a part is the exact increase of the loss, without the published code's second term (see
    solve/groups.py). A part of an attention is a key-value group with its query heads. Every pass looks at the dense
    model's activations, where the paper passes on an expectation over levels. The last stage of selection is the same
    tokens in all generations. Where a model has few groups of heads, later passes move whole groups all the same.
Numbers: 97 % of the dense accuracy at 50 % of Llama-3.1-70B (abstract).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sparsekit import fs, ranks
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import Widths
from sparsekit.contracts import (
    Anatomy,
    Kept,
    NewLinear,
    Probes,
    ReshapeContext,
    Reshaped,
    Reshaper,
    WholeModel,
)
from sparsekit.errors import PlanError
from sparsekit.models.block_files import read_block
from sparsekit.models.shapes import plainly
from sparsekit.models.structure import find_stack
from sparsekit.models.widths import head_groups, neurons
from sparsekit.search.conduct import Search
from sparsekit.search.grid import Grid
from sparsekit.search.landscape import Predictions, predictions
from sparsekit.search.layers import LayerLandscape
from sparsekit.search.options import SearchOptions
from sparsekit.search.part_levels import folder_of, identity_of, part_levels, write_chosen
from sparsekit.search.parts import Exchanges, Kind
from sparsekit.search.switches import Levels
from sparsekit.search.verdict import verdict

_RECORD_BYTES = 1 << 24


class TyrOptions(SearchOptions):
    """Options of `tyr`; those of a search are for each pass."""

    drop: float = Field(
        default=0.3, gt=0, lt=1, description="share of the groups of heads, and of the neurons, that go"
    )
    parts: Literal["both", "heads", "neurons"] = Field(default="both", description="what goes")
    choose: Literal["tyr", "uniform"] = Field(default="tyr", description="uniform: as many in every block, no search")
    passes: int = Field(default=4, ge=1, description="searches, each around the last with half its step")
    levels: int = Field(default=4, ge=1, le=100, description="levels on each side, in every pass")
    multiple: int = Field(default=8, ge=1, description="neurons go in multiples of this")
    head_rounds: int = Field(default=1, ge=1, description="rounds of removal between two levels of heads")
    neuron_rounds: int = Field(default=16, ge=1, description="rounds of removal between two levels of neurons")
    damping: float = Field(default=0.01, gt=0, le=0.3, description="added to the diagonal, as a share of its mean")
    switches: int = Field(default=3, ge=1, description="most exchanges between a parent and its offspring")
    generations: int = Field(default=50, ge=1, description="most generations of each pass")


@dataclass(frozen=True)
class _Pass:
    """A finished search: the grids it was over, what it chose, and for the report how it went."""

    grids: tuple[Grid, ...]
    best: Levels
    record: dict[str, Any]

    def kept(self, kinds: Sequence[Kind]) -> list[dict[str, int]]:
        """Return the kept weights of every linear of each kind."""
        found, place = [], 0
        for kind, grid in zip(kinds, self.grids, strict=True):
            names = [linear.name for linear in kind.linears]
            found.append(grid.counts(dict(zip(names, self.best[place : place + len(names)], strict=True))))
            place += len(names)
        return found


class Tyr(Reshaper[TyrOptions]):
    """Remove heads and neurons where the model misses them least."""

    options_type = TyrOptions
    needs = frozenset({"gram"})

    def check(self, anatomy: Anatomy) -> None:
        """Refuse families whose heads or neurons cannot go, and a sparsity that leaves a block none."""
        for kind in self._kinds(anatomy):
            kind.uniform(self.options.drop)

    def probes(self) -> Probes | None:
        """Return the part of the calibration text that choices are compared on, in each pass and as often at random."""
        return self.options.probes(2 * self.options.passes) if self.options.choose == "tyr" else None

    def null(self, name: str) -> TyrOptions | None:
        """`uniform`: as many groups and neurons of every block."""
        return self.options.model_copy(update={"choose": "uniform"}) if name == "uniform" else None

    def plan(self, context: ReshapeContext) -> dict[str, JSON]:
        """Search; write what is left of the linears that read heads and neurons into files of the context's folder."""
        kinds = self._kinds(context.anatomy)
        start = [kind.uniform(self.options.drop) for kind in kinds]
        last = self._search(context, kinds, start) if self.options.choose == "tyr" else self._uniform(kinds, start)
        plan: dict[str, JSON] = {}
        for kind, kept in zip(kinds, last.kept(kinds), strict=True):
            counts = {str(linear.block): kind.parts(linear, kept[linear.name]) for linear in kind.linears}
            context.facts[kind.name] = {block: float(count) for block, count in counts.items()}
            plan[kind.name] = dict(counts)
        with part_levels(context, kinds, last.grids, self.options.damping) as stores:
            chosen = folder_of(context) / "chosen"
            plan["files"] = ranks.share(lambda: write_chosen(chosen, kinds, last.best, stores))
        return plan

    def apply(self, anatomy: Anatomy, plan: Mapping[str, JSON], folder: Path | None) -> Reshaped:
        """Cut every block to the widths of the plan, with the linears behind heads and neurons from its files."""
        assert folder is not None  # noqa: S101  (`plan` has kept files in it)
        names = {(kind.name, linear.block): linear.name for kind in self._kinds(anatomy) for linear in kind.linears}
        groups, neuron, files = (_mapping(plan.get(key, {})) for key in ("groups", "neurons", "files"))

        def linears(block: int) -> dict[str, NewLinear]:
            found = read_block(folder / "chosen", block, files)
            return {
                names[key.removesuffix(".weight"), block]: NewLinear(weight)
                for key, weight in found.items()
                if key.endswith(".weight")
            }

        def kept(block: int) -> Kept:
            found = read_block(folder / "chosen", block, files)
            return Kept(found.get("groups.kept"), found.get("neurons.kept"))

        blocks = range(anatomy.blocks)
        widths = [Widths(groups.get(str(block)), neuron.get(str(block))) for block in blocks]
        config, shapes = plainly(anatomy.model, anatomy.shapes.narrowed(widths))
        return Reshaped(tuple(blocks), config, shapes, linears, kept)

    def _kinds(self, anatomy: Anatomy) -> list[Kind]:
        """Return what can go of each block; raises UnsupportedFamily or PlanError where it cannot."""
        options, model, stack = self.options, anatomy.model, find_stack(anatomy.model)
        found = []
        if options.parts != "neurons":
            heads = [head_groups(model, stack, block) for block in range(anatomy.blocks)]
            infos = tuple(linear.info for linear, _ in heads)
            sets = {linear.name: groups for linear, groups in heads}
            found.append(Kind("groups", infos, sets, 1, options.head_rounds))
        if options.parts != "heads":
            mlps = [neurons(model, stack, block) for block in range(anatomy.blocks)]
            infos = tuple(linear.info for linear, _ in mlps)
            sets = {linear.name: each for linear, each in mlps}
            found.append(Kind("neurons", infos, sets, options.multiple, options.neuron_rounds))
        for kind in found:
            if len(outputs := {linear.out_features for linear in kind.linears}) > 1:
                raise PlanError(
                    f"blocks exchange {kind.name} one for one, but write streams of different widths: "
                    f"{', '.join(map(str, sorted(outputs)))}",
                    hint="Remove heads and neurons first and slice afterwards.",
                )
        return found

    def _uniform(self, kinds: Sequence[Kind], start: Sequence[Mapping[str, int]]) -> _Pass:
        grids = tuple(kind.grid(kept, kind.unit, 0) for kind, kept in zip(kinds, start, strict=True))
        return _Pass(grids, (0,) * sum(len(kind.linears) for kind in kinds), {})

    def _grids(self, kinds: Sequence[Kind], kept: Sequence[Mapping[str, int]], number: int) -> tuple[Grid, ...]:
        """Return the levels of a pass around what the one before has found."""
        options = self.options
        steps = [kind.step(options.drop, options.levels, number) for kind in kinds]
        return tuple(kind.grid(each, step, options.levels) for kind, each, step in zip(kinds, kept, steps, strict=True))

    def _search(self, context: ReshapeContext, kinds: Sequence[Kind], kept: list[dict[str, int]]) -> _Pass:
        """Return the last of the passes; those that an interrupted run has finished are not done again."""
        last = self._uniform(kinds, kept)
        if all(grid.rigid for grid in self._grids(kinds, kept, 0)):
            context.reporter.note("search: no two blocks can exchange anything, uniform is all there is")
            return last
        began = time.perf_counter()
        found: list[_Pass] = []
        with context.whole() as model:
            dense = predictions(model, self.options, context.reporter)
            for number in range(self.options.passes):
                grids = self._grids(kinds, last.kept(kinds), number)
                path = folder_of(context) / f"pass-{number}.json"
                identity = jsonio.digest(identity_of(context, grids))
                done = ranks.share(partial(_finished, path, grids, identity))
                if done is None:
                    passed = time.perf_counter() - began
                    done = self._pass(context, kinds, grids, model, dense, found, passed)
                    record = {**done.record, "identity": identity, "best": list(done.best)}
                    ranks.share(partial(fs.replace_file, path, jsonio.canonical(record)))
                found.append(done)
                last = done
        self._report(context, found)
        return last

    def _pass(
        self,
        context: ReshapeContext,
        kinds: Sequence[Kind],
        grids: tuple[Grid, ...],
        model: WholeModel,
        dense: Predictions,
        before: Sequence[_Pass],
        passed_seconds: float,
    ) -> _Pass:
        """Search among the levels of some grids; the first pass measures the nulls too, and fixes the generations."""
        options = self.options
        if before:
            options = options.model_copy(update={"generations": before[0].record["generations"], "budget": None})
        linears = [linear for kind in kinds for linear in kind.linears]
        with part_levels(context, kinds, grids, self.options.damping) as stores:
            landscape = LayerLandscape(linears, stores, model, dense)
            speed, reporter, folder = dense.tokens_per_second, context.reporter, folder_of(context)
            search = Search(options, landscape, speed, reporter, self.seed, folder, identity_of(context, grids))
            schedule = search.schedule(passed_seconds, 2 * options.passes)
            exchanges = Exchanges(kinds, grids, options.switches)
            start = (0,) * len(linears)
            uniform = before[0].record["uniform"] if before else search.fitness(start, schedule)
            best, spent = search.evolve(start, exchanges.mutate, schedule, "uniform", uniform)
            record: dict[str, Any] = {
                "generations": schedule.generations,
                "samples": spent,
                "history": search.history,
                "fitness": search.fitness(best, schedule),
            }
            if not before:
                record["uniform"] = uniform
                record["random_search"] = search.random(exchanges.draw, schedule, spent * options.passes)[1]
            landscape.leave()
        return _Pass(grids, best, record)

    def _report(self, context: ReshapeContext, passes: Sequence[_Pass]) -> None:
        """Say how the search went, and how it compares."""
        first, last = passes[0].record, passes[-1].record
        history: dict[str, float] = {}
        for number, each in enumerate(passes):
            after = number * first["generations"]
            history |= {str(after + int(key)): value for key, value in each.record["history"].items()}
        found = {"tyr": last["fitness"], "uniform": first["uniform"], "random_search": first["random_search"]}
        spent = sum(each.record["samples"] for each in passes)
        context.facts["fitness_by_generation"] = history
        context.facts["fitness"] = found
        context.facts["generations"] = {"all": float(first["generations"] * len(passes))}
        context.facts["tokens_searched"] = {"all": float(spent * self.options.sequence_length)}
        context.reporter.note(f"search: {verdict('tyr', found)}")


def _finished(path: Path, grids: tuple[Grid, ...], identity: str) -> _Pass | None:
    """Return a pass that an interrupted run has finished, None where there is none of these grids."""
    if not path.exists():
        return None
    _, record = jsonio.read(path, limit_bytes=_RECORD_BYTES)
    if not isinstance(record, dict) or record.get("identity") != identity:
        return None
    best: Any = record["best"]
    return _Pass(grids, tuple(best), {key: value for key, value in record.items() if key not in ("identity", "best")})


def _mapping(value: JSON) -> dict[str, Any]:
    assert isinstance(value, dict)  # noqa: S101  (a plan that `plan` has made)
    return dict(value)
