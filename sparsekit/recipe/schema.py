"""What a recipe says, as frozen models that refuse unknown keys.

A stage's method is looked up in the registry and its options stand beside the stage's own keys, so the model
of a stage is `PruneStage` joined with the method's options. `sparsekit.recipe.load` turns what these models
refuse into messages with file, line and column.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sparsekit import registry
from sparsekit.errors import PluginBroken, RecipeSchemaError, UnknownName
from sparsekit.pattern import NM, parse_pattern

_ROUNDED = 1e-3
Selectors = TypeVar("Selectors", tuple[str, ...], dict[str, float])
Null = Literal["uniform", "random"]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys refused, no conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
            raise _errors(type(self), [{"type": error, "loc": ("sparsity",), "input": self.sparsity}])
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
        return _options(self, "pruners")

    def part(self, room: str) -> tuple[str, Any] | None:
        """Return name and options of the allocator, refiner or update; None without one.

        Args:
            room: One of `PARTS`. The options are an instance of the method's `options_type`.
        """
        spec = getattr(self, room)
        return None if spec is None else (spec.method, _options(spec, room))


class ReshapeStage(Section):
    """One change of the model's shape; the options of its method stand beside these keys."""

    stage: Literal["reshape"] = Field(description="kind of stage; comes before all pruning")
    method: str = Field(description="name of a reshaper")

    def method_options(self) -> Any:
        """Return the options of the method: an instance of its `options_type`."""
        return _options(self, "reshape")


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
        return _options(self, "activations")


Stage = PruneStage | ReshapeStage | ActivationStage
STAGES: dict[str, tuple[type[Stage], str]] = {
    "reshape": (ReshapeStage, "reshape"),
    "prune": (PruneStage, "pruners"),
    "activations": (ActivationStage, "activations"),
}
"""Kind of stage, in the order they run -> its model, and the room that its `method` is of."""


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
    stages: tuple[Annotated[SerializeAsAny[Stage], PlainValidator(lambda value: _stage(value))], ...] = Field(
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


@cache
def stage_model(kind: str, method: str) -> type[Any]:
    """Return the model of a kind of stage joined with the options of its method.

    Raises:
        UnknownName: No such method.
        PluginBroken: An option is called like a key of the stage.
    """
    return _joined(*STAGES[kind], method)


@cache
def part_model(room: str, method: str) -> type[Any]:
    """Return the spec of `PARTS` joined with the options of a method of that room; raises as `stage_model`."""
    return _joined(PARTS[room], room, method)


def stage_kind(raw: Any) -> str:
    """Return the kind of stage a mapping is meant to be: as `stage` or a misspelt key says, else by its method."""
    found = raw if isinstance(raw, dict) else {}
    meant = [value for key, value in found.items() if near(str(key), ["stage"]) and value in [*STAGES]]
    meant += [kind for kind, (_, room) in STAGES.items() if found.get("method") in registry.names(room)]
    return meant[0] if meant else "prune"


def near(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice a misspelt word most likely means."""
    found = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def _joined(base: type[Any], room: str, method: str) -> type[Any]:
    options = registry.load(room, method).options_type
    if clash := sorted(name for name in options.model_fields if hasattr(base, name) or name in base.model_fields):
        raise PluginBroken(
            f"{registry.ROOMS[room][0]} {method!r} of {registry.source(room, method)} has an option "
            f"{clash[0]!r}, which is a key of every stage",
            hint="Ask its authors to rename the option.",
        )
    # the options first: pydantic then lists the base's keys first and takes the base's (strict) configuration
    return create_model(f"{base.__name__}_{method}", __base__=(options, base), __doc__=base.__doc__)


def _options(joined: BaseModel, room: str) -> Any:
    options = registry.load(room, str(getattr(joined, "method"))).options_type  # noqa: B009
    return options.model_validate({name: getattr(joined, name) for name in options.model_fields})


def _stage(value: Any) -> Stage:
    if isinstance(value, PruneStage | ReshapeStage | ActivationStage):
        value = value.model_dump(mode="json")
    kind = value.get("stage") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in STAGES:
        hint = near(kind, STAGES)
        text = f"must be {', '.join([*STAGES][:-1])} or {[*STAGES][-1]}, got {kind!r}" + (
            f"; did you mean {hint!r}?" if hint else ""
        )
        error = PydanticCustomError("kind", "{text}", {"text": text})
        raise _errors(PruneStage, [{"type": error, "loc": ("stage",), "input": kind}])
    known = stage_kind(value)
    raw = _implied_sparsity(value) if known == "prune" else value
    return _with_method(raw, STAGES[known][0], lambda method: stage_model(known, method))  # type: ignore[no-any-return]


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
        return _with_method(raw, base, lambda method: part_model(room, method))
    except ValidationError as error:
        if isinstance(value, str):  # the name stands at the key itself
            raise _errors(base, [{**_detail(item), "loc": ()} for item in error.errors()]) from error
        raise


def _with_method(raw: Any, base: type[Any], joined: Any) -> Any:
    """Validate `raw` by the model of the method it names; without a usable name, by what is shared."""
    if not isinstance(raw, dict):
        raise PydanticCustomError("kind", "must be a mapping of keys to values")
    if not isinstance(raw.get("method"), str):
        return _shared_keys_only(raw, base, [])
    try:
        model = joined(raw["method"])
    except UnknownName as error:
        unknown: InitErrorDetails = {
            "type": PydanticCustomError("unknown_method", "{text}", {"text": str(error)}),
            "loc": ("method",),
            "input": raw["method"],
        }
        return _shared_keys_only(raw, base, [unknown])
    return model.model_validate_json(json.dumps(raw))


def _shared_keys_only(raw: dict[str, Any], base: type[Any], problems: list[InitErrorDetails]) -> Any:
    """Report what is wrong in any case; a key unlike the shared ones may be the unknown method's option."""
    known = {key: value for key, value in raw.items() if key in base.model_fields or near(key, base.model_fields)}
    try:
        base.model_validate_json(json.dumps(known))
    except ValidationError as error:
        problems = problems + [_detail(item) for item in error.errors()]
    raise _errors(base, problems)


def _detail(item: Any) -> InitErrorDetails:
    kind = item["type"]
    if kind in ("missing", "extra_forbidden"):
        return {"type": kind, "loc": item["loc"], "input": item["input"]}
    error = PydanticCustomError(kind, "{text}", {"text": item["msg"]})
    return {"type": error, "loc": item["loc"], "input": item["input"]}


def _errors(model: type[BaseModel], problems: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data(model.__name__, problems, input_type="json")


def _rise(value: Any) -> Any:
    """Turn a text such as +1% into a number."""
    found = re.fullmatch(r"\+?(\d+(?:\.\d+)?)\s*%", value) if isinstance(value, str) else None
    return float(found[1]) / 100 if found else value


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _check_selector(entry: str) -> None:
    """Raise ValueError unless the entry is a glob or `re:` and a regular expression."""
    try:
        if not entry:
            raise ValueError("an entry is empty; write a glob such as *.mlp.* or re: and a regular expression")
        re.compile(entry[3:] if entry.startswith("re:") else fnmatch.translate(entry))
    except re.error as error:
        raise ValueError(f"{entry!r} is not a regular expression: {error}") from error
