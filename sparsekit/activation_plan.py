"""What an activation stage will do, decided before any weight is read: signals, coverage, amounts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit import registry
from sparsekit.contracts import ActivationCalibrator, Site
from sparsekit.errors import LowCoverage, PlanError, TooFewTokens
from sparsekit.models.gate_files import prompt_of
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.sites import Place, gate_places, input_places, neuron_places
from sparsekit.recipe.stages import ActivationStage
from sparsekit.selection import matches

HELD_OUT = 8
"""One calibration sample of so many is kept apart: what is achieved is measured on it."""
HIGHEST = 0.9
"""Highest share that an allocation by errors gives a signal."""
LEVELS = tuple(step / 10 for step in range(1, round(10 * HIGHEST) + 1))
"""Levels that the errors of a signal are measured at."""
SEARCH_STEPS = 7
"""Of the search for the sparsity that a budget allows: to within 1 / 128 of its range."""
_LEAST_ENTRIES = 1000
"""Entries of a signal on either side of a quantile."""


@dataclass(frozen=True)
class ActivationPlan:
    """An activation stage applied to one model.

    Attributes:
        stage: The recipe's stage.
        calibrator: The method, with its options.
        sites: Signals to thin out, in the order of the model.
        coverage: Share of all matrix weights of the blocks that can be skipped.
    """

    stage: ActivationStage
    calibrator: ActivationCalibrator[Any]
    sites: tuple[Site, ...]
    coverage: float

    @property
    def numel(self) -> int:
        """Number of weights that can be skipped."""
        return sum(site.numel for site in self.sites)

    @property
    def by_prompt(self) -> bool:
        """Whether entries are chosen by a prompt, and not at every token."""
        return self.calibrator.rule == "prompt"

    def prompt(self, sequence_length: int) -> int:
        """Return how many leading tokens of a text are its prompt: dense, and not scored."""
        return prompt_of(sequence_length) if self.by_prompt else 0

    def dense(self, sequence_length: int) -> int:
        """Return how many leading tokens of a text stay dense."""
        return self.prompt(sequence_length) or self.stage.dense_tokens

    def forwards(self, tokens: int, sequence_length: int) -> float:
        """Return how many tokens go through a block, all blocks together, for an estimate."""
        blocks = len({site.block for site in self.sites})
        stops = 3.5 + 3 / HELD_OUT  # up to each signal in turn; and gates on text kept apart, twice
        calibrated = stops * tokens * blocks * (SEARCH_STEPS if self.stage.budget else 1)
        if self.stage.allocate == "uniform":
            return calibrated
        return calibrated + len(self.sites) * len(LEVELS) * self.stage.probe_samples * sequence_length

    def places(self, model: LazyModel, index: int) -> list[Place]:
        """Return where the sites of a block are."""
        wanted = {site.name for site in self.sites}
        return [place for place in _places(model, self.calibrator, index) if place.site.name in wanted]


def plan_activations(model: LazyModel, stage: ActivationStage, seed: int, *, where: str) -> ActivationPlan:
    """Resolve an activation stage against a model; `where` names the stage in errors, such as `stages.1`.

    Raises:
        PlanError: A targets or ignore entry matches nothing, no signal is left, or too high a sparsity.
        UnsupportedFamily: The architecture has no signal of the kind that the method thins out.
        LowCoverage: What the signals let skip is less than the stage's min_coverage.
    """
    calibrator: ActivationCalibrator[Any] = registry.load("activations", stage.method)(stage.method_options(), seed)
    if stage.sparsity is not None and stage.sparsity > HIGHEST and stage.allocate != "uniform":
        raise PlanError(
            f"sparsity {stage.sparsity:g} is more than {HIGHEST:g}, the most that allocate: {stage.allocate} measures",
            where=f"{where}.sparsity",
            hint="Lower it, or set allocate: uniform.",
        )
    if calibrator.rule == "prompt" and stage.prefill == "sparse":
        raise PlanError(
            f"{stage.method} chooses by the prompt, which therefore is dense",
            where=f"{where}.prefill",
            hint="Leave prefill out.",
        )
    known = [place.site for index in range(model.blocks) for place in _places(model, calibrator, index)]
    names = [site.name for site in known]
    modules = [name for name, _ in model.module.named_modules()]
    chosen = set(names) if not stage.targets else matches(stage.targets, names, names, f"{where}.targets")
    chosen -= matches(stage.ignore, names, modules, f"{where}.ignore")
    sites = tuple(site for site in known if site.name in chosen)
    if not sites:
        raise PlanError(
            f"no signal is left for {stage.method} to thin out", where=where, hint="Check targets and ignore."
        )
    covered = sum({linear.name: linear.numel for site in sites for linear in site.skips}.values())
    total = model.stack.matrix_weights()
    least = calibrator.least_coverage if stage.min_coverage is None else stage.min_coverage
    if covered < least * total:
        raise LowCoverage(
            f"{stage.method} can skip {covered / total:.1%} of the block weights here, {least:.0%} are asked for",
            where=where,
            hint="Widen targets, or set min_coverage in the stage to accept this.",
        )
    return ActivationPlan(stage, calibrator, sites, covered / total)


def check_text(plan: ActivationPlan, samples: int, sequence_length: int, *, where: str) -> None:
    """Refuse calibration text that is too short for the quantiles asked for.

    Raises:
        TooFewTokens: with both numbers.
    """
    if samples < 2:
        raise TooFewTokens(
            f"{plan.stage.method} needs at least 2 calibration samples, one of them to measure on; got {samples}",
            where=where,
            hint="Raise calibration.samples.",
        )
    dense = plan.dense(sequence_length)
    if sequence_length <= dense + 1:
        raise TooFewTokens(
            f"the first {dense} tokens stay dense, samples have {sequence_length}",
            where=f"{where}.dense_tokens",
            hint="Raise calibration.sequence_length.",
        )
    if plan.by_prompt:
        return  # no quantile is taken
    share = plan.stage.sparsity or 0.5
    tokens = (samples - held_out(samples)) * (sequence_length - dense)
    narrowest = min(plan.sites, key=lambda site: site.width)
    needed = _LEAST_ENTRIES / (min(share, 1 - share) * narrowest.width)
    if tokens < needed:
        raise TooFewTokens(
            f"the {share:g} quantile of the {narrowest.width} entries of {narrowest.name} needs at least "
            f"{needed:.0f} tokens, got {tokens}",
            where=where,
            hint="Raise calibration.samples or sequence_length.",
        )


def held_out(samples: int) -> int:
    """Return how many of so many calibration samples are kept apart."""
    return max(1, samples // HELD_OUT)


def _places(model: LazyModel, calibrator: ActivationCalibrator[Any], index: int) -> Sequence[Place]:
    """Return where a method thins out a block."""
    found: list[Place] = []
    if "input" in calibrator.kinds:
        found += input_places(model.module, model.stack, index)
    if "gate" in calibrator.kinds:
        found += gate_places(model.module, model.stack, index)
    if "neurons" in calibrator.kinds:
        found += neuron_places(model.module, model.stack, index)
    return [place for place in found if calibrator.covers(place.site)]
