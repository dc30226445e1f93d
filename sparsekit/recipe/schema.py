"""What a recipe says, as frozen models that refuse unknown keys.

Its stages are those of `sparsekit.recipe.stages`. `sparsekit.recipe.load` turns what these models refuse into messages
with file, line and column.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, SerializeAsAny, field_validator, model_validator

from sparsekit.recipe.joined import Section
from sparsekit.recipe.stages import STAGES, ActivationStage, PruneStage, ReshapeStage, Stage, parse_stage

Null = Literal["uniform", "random"]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class CalibrationSpec(Section):
    """Text that methods are calibrated on."""

    source: str = Field(
        default="c4",
        min_length=1,
        description="Hub data set id, `builtin`, `stdlib` (code), `self` (by the model), a path or glob of text files",
    )
    config: str | None = Field(default=None, description="configuration of a Hub data set")
    split: str | None = Field(default=None, description="split of a Hub data set")
    field: str | None = Field(default=None, description="field that holds the text")
    samples: int = Field(default=128, ge=1, description="number of token sequences")
    sequence_length: int | None = Field(
        default=None, ge=8, description="tokens per sample; null: the model's maximum, at most 2048"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the choice of samples")


class SaveSpec(Section):
    """How the checkpoint is written."""

    format: Literal["auto", "dense", "bitmask", "nm", "block"] = Field(
        default="auto", description="layout of pruned weights; auto: per tensor the smallest that loses nothing"
    )
    values: Literal["auto", "raw", "split", "int8", "int4"] = Field(
        default="auto", description="encoding of kept values; auto never loses a bit, int8 and int4 do"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.format == "dense" and self.values not in ("auto", "raw"):
            raise ValueError(f"values: {self.values} needs a packed format, not format: dense")
        return self


class EvaluateSpec(Section):
    """What is measured on the dense and the pruned model."""

    text: str = Field(
        default="builtin", min_length=1, description="text for perplexity and KL: a source as in calibration"
    )
    samples: int = Field(default=16, ge=1, description="number of token sequences")
    sequence_length: int | None = Field(
        default=512, ge=8, description="tokens per sample; null: the model's maximum, at most 2048"
    )
    tasks: tuple[str, ...] = Field(default=(), description="lm-eval tasks")
    optional_tasks: tuple[str, ...] = Field(
        default=(), description="more of them, which are left out with a note where lm-eval is not installed"
    )
    limit: int | None = Field(default=None, ge=1, description="only the first documents of each task; null: all")
    nulls: tuple[Null, ...] = Field(
        default=(),
        description="run again for comparison: uniform (instead of the allocation), random (instead of the pruner)",
    )

    @field_validator("nulls")
    @classmethod
    def _once(cls, nulls: tuple[Null, ...]) -> tuple[Null, ...]:
        if len(set(nulls)) < len(nulls):
            raise ValueError(f"names {next(null for null in nulls if nulls.count(null) > 1)!r} twice")
        return nulls


class Gates(Section):
    """Least quality; a miss ends the command with exit code 6."""

    max_perplexity_ratio: float | None = Field(default=None, gt=0, description="highest pruned / dense perplexity")
    max_kl: float | None = Field(
        default=None, ge=0, description="highest KL divergence to the dense model, nats per token"
    )
    min_metrics: dict[str, float] = Field(default={}, description="lowest value per task/metric")

    @field_validator("min_metrics")
    @classmethod
    def _task_metric(cls, values: dict[str, float]) -> dict[str, float]:
        for key in values:
            task, _, metric = key.rpartition("/")
            if not (task and metric):
                raise ValueError(f"key {key!r} must be task/metric, such as arc_easy/acc")
        return values


class Recipe(Section):
    """One experiment: calibrate, run the stages in order, save, evaluate, hold the gates."""

    sparsekit: Literal[1] = Field(description="version of the recipe schema")
    name: str = Field(pattern=_NAME, description="letters, digits, dot, dash and underscore, at most 64")
    description: str = Field(min_length=1, max_length=100, pattern=r"^[^\n]*$", description="one line")
    calibration: CalibrationSpec = CalibrationSpec()
    stages: tuple[Annotated[SerializeAsAny[Stage], PlainValidator(lambda value: parse_stage(value))], ...] = Field(
        min_length=1, description="what is done to the model, in order"
    )
    save: SaveSpec = SaveSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        kinds = [stage.stage for stage in self.stages]
        order = [*STAGES]
        for before, kind in pairwise(kinds):
            if order.index(before) > order.index(kind):
                raise ValueError(
                    f"{_article(kind)} stage stands behind {_article(before)} stage; the order is reshape, prune, "
                    "activations: each works on what the ones before it have left"
                )
        if kinds.count("activations") > 1:
            raise ValueError("two activations stages; a signal has one threshold, so one stage sets them all")
        if self.save.format not in ("auto", "dense") and "prune" not in kinds:
            raise ValueError(f"save.format {self.save.format} packs pruned weights, and no stage prunes")
        return self

    @property
    def prunes(self) -> tuple[PruneStage, ...]:
        """Stages that prune."""
        return tuple(stage for stage in self.stages if isinstance(stage, PruneStage))

    @property
    def reshapes(self) -> tuple[ReshapeStage, ...]:
        """Stages that change shapes; they come first."""
        return tuple(stage for stage in self.stages if isinstance(stage, ReshapeStage))

    @property
    def activations(self) -> ActivationStage | None:
        """The stage that calibrates activation sparsity; it comes last."""
        return next((stage for stage in self.stages if isinstance(stage, ActivationStage)), None)

    def resolved(self) -> dict[str, Any]:
        """Return the whole recipe as JSON-able data: defaults and methods' options in, nothing inherited."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Sha256 (hexadecimal) of the resolved recipe."""
        canonical = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
