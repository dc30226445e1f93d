"""The stages of a recipe, as frozen models that refuse unknown keys.

A stage's method is looked up in the registry and its options stand beside the stage's own keys, so the model of a stage
is for instance `PruneStage` joined with the method's options.
"""

from __future__ import annotations

import fnmatch
import re
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparsekit import registry
from sparsekit.errors import RecipeSchemaError
from sparsekit.pattern import NM, parse_pattern
from sparsekit.recipe.joined import Section, detail, joined, near, options_of, refusal, with_method

_ROUNDED = 1e-3
Selectors = TypeVar("Selectors", tuple[str, ...], dict[str, float])


class AllocateSpec(Section):
    """How a stage's budget is distributed over linears: an allocator's name and its options."""

    method: str = Field(default="uniform", description="name of an allocator")


class RefineSpec(Section):
    """How a stage's masks are improved at equal counts: a refiner's name and its options."""

    method: str = Field(description="name of a refiner")


class UpdateSpec(Section):
    """How the kept weights are moved for the final mask: an update's name and its options."""

    method: str = Field(description="name of an update")


PARTS: dict[str, type[AllocateSpec | RefineSpec | UpdateSpec]] = {
    "allocate": AllocateSpec,
    "refine": RefineSpec,
    "update": UpdateSpec,
}
"""Keys of a stage that name a method of the room of the same name."""


class PruneStage(Section):
    """One pruning stage; the options of its method stand beside these keys."""

    stage: Literal["prune"] = Field(description="kind of stage")
    method: str = Field(description="name of a pruner")
    sparsity: float = Field(ge=0, le=1, description="fraction of zeros; implied by an N:M pattern")
    pattern: str = Field(default="unstructured", description="unstructured, N:M (keep N of M) or RxC blocks")
    allocate: Annotated[SerializeAsAny[AllocateSpec], PlainValidator(lambda value: _part("allocate", value))] = Field(
        default_factory=lambda: _part("allocate", "uniform"),
        description="allocator: a name, or method and options",
    )
    refine: Annotated[
        SerializeAsAny[RefineSpec] | None,
        PlainValidator(lambda value: None if value is None else _part("refine", value)),
    ] = Field(default=None, description="refiner of the masks: a name, or method and options")
    update: Annotated[
        SerializeAsAny[UpdateSpec] | None,
        PlainValidator(lambda value: None if value is None else _part("update", value)),
    ] = Field(default=None, description="update of the kept weights: a name, or method and options")
    targets: tuple[str, ...] = Field(
        default=(), description="globs or re:... over dotted linear names; empty: every linear in the blocks"
    )
    ignore: tuple[str, ...] = Field(default=(), description="globs or re:... over dotted linear names to leave dense")
    overrides: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default={}, description="sparsity per glob or re:... of target names; the other targets make up the total"
    )
    propagate: Literal["block", "none"] = Field(
        default="block", description="block: later blocks see pruned activations; none: dense activations"
    )
    min_coverage: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="least share of the blocks' linear weights that the targets must cover",
    )

    @model_validator(mode="after")
    def _agrees_with_pattern(self) -> Self:
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, NM) and abs(self.sparsity - pattern.sparsity) > 1e-9:
            text = (
                f"sparsity {self.sparsity:g} disagrees with pattern {pattern}, which keeps {pattern.keep} of "
                f"every {pattern.of} weights: sparsity {pattern.sparsity:g}; write that or leave it out"
            )
            error = PydanticCustomError("recipe", "{text}", {"text": text})
            raise refusal(type(self), [{"type": error, "loc": ("sparsity",), "input": self.sparsity}])
        return self

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, text: str) -> str:
        try:
            return str(parse_pattern(text))
        except RecipeSchemaError as error:
            raise ValueError(str(error)) from error

    @field_validator("targets", "ignore", "overrides")
    @classmethod
    def _selectors(cls, entries: Selectors) -> Selectors:
        for entry in entries:
            _check_selector(entry)
        return entries

    def method_options(self) -> Any:
        """Return the options of the method: an instance of its `options_type`."""
        return options_of(self, "pruners")

    def part(self, room: str) -> tuple[str, Any] | None:
        """Return name and options of the allocator, refiner or update; None without one.

        Args:
            room: One of `PARTS`. The options are an instance of the method's `options_type`.
        """
        spec = getattr(self, room)
        return None if spec is None else (spec.method, options_of(spec, room))


class ReshapeStage(Section):
    """One change of the model's shape; the options of its method stand beside these keys."""

    stage: Literal["reshape"] = Field(description="kind of stage; comes before all pruning")
    method: str = Field(description="name of a reshaper")

    def method_options(self) -> Any:
        """Return the options of the method: an instance of its `options_type`."""
        return options_of(self, "reshape")


class ActivationBudget(Section):
    """What activation sparsity may cost."""

    perplexity: Annotated[float, BeforeValidator(lambda value: _rise(value)), Field(gt=0, le=10)] = Field(
        description="rise of the perplexity on held-out calibration text: 0.01 or +1%"
    )


class ActivationStage(Section):
    """Activation sparsity: what small entries are skipped at run time; the options of its method stand beside these."""

    stage: Literal["activations"] = Field(description="kind of stage; comes last")
    method: str = Field(description="name of a calibrator")
    sparsity: float | None = Field(
        default=None, gt=0, lt=1, description="share of the covered weights that is not read; or give a budget"
    )
    budget: ActivationBudget | None = Field(default=None, description="as much sparsity as this cost allows")
    allocate: Literal["uniform", "greedy", "global"] = Field(
        default="greedy",
        description="uniform: every signal alike; greedy: by measured errors within each block; global: between blocks",
    )
    targets: tuple[str, ...] = Field(default=(), description="globs or re:... over signals; empty: all of the method's")
    ignore: tuple[str, ...] = Field(default=(), description="globs or re:... over signals to leave dense")
    propagate: Literal["sparse", "dense"] = Field(
        default="sparse", description="sparse: thresholds are taken where earlier signals are thinned out already"
    )
    dense_tokens: int = Field(default=1, ge=0, description="first tokens of a text that stay dense")
    prefill: Literal["dense", "sparse"] = Field(default="dense", description="what generation does with the prompt")
    probe_samples: int = Field(default=2, ge=1, description="samples that errors are measured on for the allocation")
    tolerance: float = Field(
        default=0.01, gt=0, lt=1, description="how far sparsity on held-out text may be from what was asked for"
    )
    min_coverage: float | None = Field(
        default=None, ge=0, le=1, description="least share of the blocks' weights to cover; null: the method's"
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.sparsity is None) == (self.budget is None):
            got = "neither is given" if self.sparsity is None else "both are given"
            raise ValueError(f"needs either sparsity or budget; {got}")
        return self

    @field_validator("targets", "ignore")
    @classmethod
    def _selectors(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            _check_selector(entry)
        return entries

    def method_options(self) -> Any:
        """Return the options of the method: an instance of its `options_type`."""
        return options_of(self, "activations")


Stage = PruneStage | ReshapeStage | ActivationStage
STAGES: dict[str, tuple[type[Stage], str]] = {
    "reshape": (ReshapeStage, "reshape"),
    "prune": (PruneStage, "pruners"),
    "activations": (ActivationStage, "activations"),
}
"""Kind of stage, in the order they run -> its model, and the room that its `method` is of."""


@cache
def stage_model(kind: str, method: str) -> type[Any]:
    """Return the model of a kind of stage joined with the options of its method.

    Raises:
        UnknownName: No such method.
        PluginBroken: An option is called like a key of the stage.
    """
    return joined(*STAGES[kind], method)


@cache
def part_model(room: str, method: str) -> type[Any]:
    """Return the spec of `PARTS` joined with the options of a method of that room; raises as `stage_model`."""
    return joined(PARTS[room], room, method)


def stage_kind(raw: Any) -> str:
    """Return the kind of stage a mapping is meant to be: as `stage` or a misspelt key says, else by its method."""
    found = raw if isinstance(raw, dict) else {}
    meant = [value for key, value in found.items() if near(str(key), ["stage"]) and value in [*STAGES]]
    meant += [kind for kind, (_, room) in STAGES.items() if found.get("method") in registry.names(room)]
    return meant[0] if meant else "prune"


def parse_stage(value: Any) -> Stage:
    """Return the stage that a mapping says, or a stage again; what is wrong is a ValidationError."""
    if isinstance(value, PruneStage | ReshapeStage | ActivationStage):
        value = value.model_dump(mode="json")
    kind = value.get("stage") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in STAGES:
        hint = near(kind, STAGES)
        text = f"must be {', '.join([*STAGES][:-1])} or {[*STAGES][-1]}, got {kind!r}" + (
            f"; did you mean {hint!r}?" if hint else ""
        )
        error = PydanticCustomError("kind", "{text}", {"text": text})
        raise refusal(PruneStage, [{"type": error, "loc": ("stage",), "input": kind}])
    known = stage_kind(value)
    raw = _implied_sparsity(value) if known == "prune" else value
    return with_method(raw, STAGES[known][0], lambda method: stage_model(known, method))  # type: ignore[no-any-return]


def _implied_sparsity(raw: Any) -> Any:
    """Fill in the sparsity of an N:M pattern if it is not written, or written rounded (0.667 beside 1:3)."""
    try:
        pattern = parse_pattern(raw["pattern"])
    except (RecipeSchemaError, TypeError, KeyError):
        return raw  # left to the validation of the field
    if not isinstance(pattern, NM):
        return raw
    given = raw.get("sparsity", pattern.sparsity)
    close = type(given) in (int, float) and abs(given - pattern.sparsity) < _ROUNDED
    return {**raw, "sparsity": pattern.sparsity} if close else raw


def _part(room: str, value: Any) -> Any:
    base = PARTS[room]
    if isinstance(value, base):
        value = value.model_dump(mode="json")
    noun = registry.ROOMS[room][0]
    if not isinstance(value, str | dict):
        raise PydanticCustomError("kind", f"must be the {noun}'s name, or a mapping with method and its options")
    raw = {"method": value} if isinstance(value, str) else value
    method = base.model_fields["method"]
    if not method.is_required() and not any(near(key, ["method"]) for key in raw):  # misspelt, it is not left out
        raw = {"method": method.default, **raw}
    try:
        return with_method(raw, base, lambda method: part_model(room, method))
    except ValidationError as error:
        if isinstance(value, str):  # the name stands at the key itself
            raise refusal(base, [{**detail(item), "loc": ()} for item in error.errors()]) from error
        raise


def _rise(value: Any) -> Any:
    """Turn a text such as +1% into a number."""
    found = re.fullmatch(r"\+?(\d+(?:\.\d+)?)\s*%", value) if isinstance(value, str) else None
    return float(found[1]) / 100 if found else value


def _check_selector(entry: str) -> None:
    """Raise ValueError unless the entry is a glob or `re:` and a regular expression."""
    try:
        if not entry:
            raise ValueError("an entry is empty; write a glob such as *.mlp.* or re: and a regular expression")
        re.compile(entry[3:] if entry.startswith("re:") else fnmatch.translate(entry))
    except re.error as error:
        raise ValueError(f"{entry!r} is not a regular expression: {error}") from error
