"""Executing an activation stage: how much of each signal goes, thresholds block by block, and what that achieves.

Thresholds are taken where the model will be when they are used: behind signals that are thinned out already. Then the
gates are set on text that was kept apart, and signals that miss what was asked of them are calibrated again. A model
whose sparsity stays off is refused: a threshold that means something else than it says helps nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sparsekit import ranks
from sparsekit.activation_levels import Errors, allocated_levels, measure_errors, uniform_levels
from sparsekit.activation_plan import HIGHEST, SEARCH_STEPS, ActivationPlan, held_out
from sparsekit.contracts import Stat
from sparsekit.errors import CalibrationError
from sparsekit.lazy import torch
from sparsekit.models.ending import losses_behind
from sparsekit.models.expert_gates import of_expert, place_at
from sparsekit.models.gates import Gate, OfPrompt, Placed, Scope
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.sites import Place, in_order
from sparsekit.progress import Reporter
from sparsekit.signals import kept_entries, place_gate, watch_scores
from sparsekit.stats.dropped import Dropped
from sparsekit.walk import walk

if TYPE_CHECKING:
    from torch import Tensor

_ATTEMPTS = 3
"""Calibrations until the sparsity on held-out text is what was asked for."""
_SMALLEST = 0.02
"""Sparsity below which nothing is gained; a budget that does not allow it is refused."""

Gates = Mapping[str, Placed]
"""Name of a site -> its gate; sites without one stay dense."""


@dataclass(frozen=True)
class Reading:
    """What gates do on a text.

    Attributes:
        dropped: Name of a site -> what its gate left out.
        share: Share of the covered weights that was not read.
        ratio: Perplexity over that of the model without gates.
        tokens: Of the text.
    """

    dropped: Mapping[str, Dropped]
    share: float
    ratio: float
    tokens: int


@dataclass(frozen=True)
class Thinned:
    """What an activation stage did.

    Attributes:
        gates: Of every site that is thinned out.
        sparsity: Share of the covered weights that was asked for; what a budget allowed.
        levels: Name of a site -> the share it was asked for.
        held_out: What the gates do on calibration text that was kept apart.
        others: The same on text of other kinds.
        search: (sparsity, perplexity ratio) that a search for a budget went through.
        attempts: Calibrations it took.
    """

    gates: Gates
    sparsity: float
    levels: Mapping[str, float]
    held_out: Reading
    others: Mapping[str, Reading] = field(default_factory=dict)
    search: tuple[tuple[float, float], ...] = ()
    attempts: int = 1


def thin(
    model: LazyModel, plan: ActivationPlan, samples: Tensor, others: Mapping[str, Tensor], reporter: Reporter
) -> Thinned:
    """Calibrate the gates of a stage.

    Args:
        model: The model, in the state the gates are for.
        plan: The stage.
        samples: Calibration ids [samples, sequence_length]; the last of them are kept apart.
        others: Name -> ids of text of another kind, to see whether thresholds carry over.
        reporter: Told about every block.

    Raises:
        CalibrationError: The sparsity asked for is not met on held-out text, or the budget allows none.
    """
    apart = held_out(len(samples))
    work = Calibration(model, plan, samples[:-apart], samples[-apart:], reporter)
    if plan.stage.budget is None:
        assert plan.stage.sparsity is not None  # noqa: S101  (the recipe has one of the two)
        found = work.calibrated(plan.stage.sparsity)
    else:
        found = work.affordable(plan.stage.budget.perplexity)
    readings = {name: work.read(found.gates, ids, name) for name, ids in others.items()}
    return Thinned(found.gates, found.sparsity, found.levels, found.held_out, readings, found.search, found.attempts)


class Calibration:
    """A stage at work on one model and text; errors and dense losses are measured once."""

    def __init__(
        self, model: LazyModel, plan: ActivationPlan, samples: Tensor, apart: Tensor, reporter: Reporter
    ) -> None:
        """Take a model with its plan, ids [samples, sequence_length] to calibrate on, and some to measure on."""
        self.model, self.plan, self.reporter = model, plan, reporter
        self.samples, self.apart = samples, apart
        self._errors: Errors | None = None
        self._dense: dict[str, float] = {}

    def levels(self, sparsity: float) -> dict[str, float]:
        """Return how much of each signal goes."""
        if self.plan.stage.allocate == "uniform":
            return uniform_levels(self.plan, sparsity)
        if self._errors is None:
            probes = self.samples[: self.plan.stage.probe_samples]
            self._errors = measure_errors(self.model, self.plan, probes, self.reporter)
        return allocated_levels(self.plan, self._errors, sparsity)

    def calibrated(self, sparsity: float) -> Thinned:
        """Return gates that leave out what is asked for on held-out text."""
        wanted = self.levels(sparsity)
        aims, tolerance = dict(wanted), self.plan.stage.tolerance
        for attempt in range(1, _ATTEMPTS + 1):
            gates = self.gates(aims)
            reading = self.read(gates, self.apart, "held out")
            if abs(reading.share - sparsity) <= tolerance:
                return Thinned(gates, sparsity, wanted, reading, attempts=attempt)
            aims = {name: _corrected(aims[name], wanted[name], reading.dropped.get(name)) for name in aims}
        raise CalibrationError(
            f"{reading.share:.1%} of the covered weights are skipped on held-out text after {_ATTEMPTS} calibrations, "
            f"asked for were {sparsity:.1%} +- {tolerance:.1%}",
            where=f"activations ({self.plan.stage.method})",
            hint="Calibrate on more text (calibration.samples), or raise tolerance in the stage.",
        )

    def affordable(self, rise: float) -> Thinned:
        """Return gates of the highest sparsity whose perplexity on held-out text rises by no more than `rise`."""
        low, high, best = 0.0, HIGHEST, None
        tried: list[tuple[float, float]] = []
        for _ in range(SEARCH_STEPS):
            sparsity = (low + high) / 2
            found = self.calibrated(sparsity)
            tried.append((sparsity, found.held_out.ratio))
            self.reporter.note(f"sparsity {sparsity:.1%}: perplexity x {found.held_out.ratio:.4f} on held-out text")
            if found.held_out.ratio <= 1 + rise:
                low, best = sparsity, found
            else:
                high = sparsity
            if high < _SMALLEST:
                break
        if best is None:
            sparsity, ratio = tried[-1]
            raise CalibrationError(
                f"perplexity may rise by {rise:.2%}, and rises by {ratio - 1:.2%} at a sparsity of only {sparsity:.1%}",
                where=f"activations ({self.plan.stage.method})",
                hint="Allow more, thin out fewer signals (ignore), or measure on more text (calibration.samples).",
            )
        return Thinned(best.gates, best.sparsity, best.levels, best.held_out, {}, tuple(tried), best.attempts)

    def gates(self, levels: Mapping[str, float]) -> dict[str, Placed]:
        """Walk the model and set a gate at every signal, one after the other."""
        plan, found = self.plan, dict[str, Placed]()
        if plan.by_prompt:  # numbers, for which nothing is to be seen
            sites = [site for site in plan.sites if levels[site.name] > 0]
            return {site.name: Placed(site.kind, OfPrompt(kept_entries(site, levels[site.name]))) for site in sites}
        sparse, scope = plan.stage.propagate == "sparse", Scope(plan.dense(self.samples.shape[1]))
        with _undoing() as later:
            for visit in walk(self.model, self.samples, self.reporter, task=f"thresholds ({plan.stage.method})"):
                later.now()
                places = [place for place in plan.places(self.model, visit.index) if levels[place.site.name] > 0]
                steps = in_order(places, visit.sequence())
                for step in steps if sparse else [places]:
                    signals = watch_scores(visit, plan, step)
                    for place in step:
                        name = place.site.name
                        found[name] = place_gate(plan, place, levels[name], signals[name], self.model.dtype)
                        if sparse:
                            later.add(place_at(place, found[name], scope))
        return found

    def read(self, gates: Gates, ids: Tensor, text: str) -> Reading:
        """Run the model with its gates on a text, `ids: [samples, sequence_length]`."""
        if text not in self._dense:
            self._dense[text] = self._run({}, ids, f"{text}: dense")[1]
        dropped, loss = self._run(gates, ids, text)
        skipped = sum(stat.share * site.numel for site in self.plan.sites if (stat := dropped.get(site.name)))
        ratio = math.exp(min(loss - self._dense[text], 700.0))
        return Reading(dropped, skipped / self.plan.numel, ratio, ids.numel())

    def _run(self, gates: Gates, ids: Tensor, task: str) -> tuple[dict[str, Dropped], float]:
        """Return what gates drop, and the mean loss in nats."""
        plan, found = self.plan, dict[str, Dropped]()
        hidden: list[Tensor] = []
        length = ids.shape[1]
        scope = Scope(plan.dense(length))
        with _undoing() as later:
            for visit in walk(self.model, ids, self.reporter, task=task):
                later.now()
                places = [place for place in plan.places(self.model, visit.index) if place.site.name in gates]
                for place in places:
                    later.add(place_at(place, gates[place.site.name], scope))
                if places:
                    found |= self._watch(visit.watch, visit.prefix, places, gates, scope.dense)
                if visit.index == self.model.blocks - 1:
                    hidden = visit.outputs()
        own = losses_behind(self.model, ids[ranks.portion(len(ids))], hidden, plan.prompt(length))
        return found, float(torch.cat(ranks.gather(own)).mean())

    def _watch(
        self, watch: Callable[..., dict[str, Stat]], prefix: str, places: Collection[Place], gates: Gates, skip: int
    ) -> dict[str, Dropped]:
        """Return what the gates of a block drop. A gate's own output has zeros; an input is seen as it comes."""
        inputs: dict[str, Stat] = {}
        outputs: dict[str, Stat] = {}
        keys: dict[str, list[str]] = {}
        for place in places:
            name, width, gate = place.site.name, place.site.width, gates[place.site.name].gate
            if place.site.kind == "gate":
                keys[name] = [name.removeprefix(f"{prefix}.")]
                outputs[keys[name][0]] = Dropped(width, None, skip)
                continue
            keys[name] = [reader.name for reader in place.readers]
            for number, reader in enumerate(place.readers):
                first = skip if place.experts is None else 0
                inputs[reader.name] = Dropped(width, partial(_kept_behind, of_expert(gate, number)), first)
        seen = watch(inputs, outputs)
        found: dict[str, Dropped] = {}
        for place in places:
            pooled = found[place.site.name] = Dropped(place.site.width)
            for key in keys[place.site.name]:
                pooled.merge(seen[key])
        return found


def _kept_behind(gate: Gate, first: Tensor, x: Tensor) -> Tensor:
    """Return which entries a gate keeps, given the dense tokens of a text and those behind them."""
    return gate.behind(first).keep(x)


def _corrected(aim: float, wanted: float, dropped: Dropped | None) -> float:
    """Return what to aim at so that a signal which got `dropped` gets what is wanted."""
    if dropped is None or not dropped.share or not wanted:
        return aim
    return min(aim * wanted / dropped.share, 1 - (1 - aim) * 0.1)


class _Undo:
    """What has to be undone once the walk has left a block: it propagates after the visit."""

    def __init__(self) -> None:
        self._todo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        self._todo.append(undo)

    def now(self) -> None:
        for undo in reversed(self._todo):
            undo()
        self._todo.clear()


@contextmanager
def _undoing() -> Iterator[_Undo]:
    later = _Undo()
    try:
        yield later
    finally:
        later.now()
