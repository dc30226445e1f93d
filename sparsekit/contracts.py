"""What a method is. Methods differ in what they return, and in nothing else.

Weights are [out, in], activations [tokens, in], `keep` is boolean [out, in] with True = kept, a `budget` is an
integer number of kept weights. Capturing inputs, hooks, propagation, progress, resuming, dtypes and finite checks
belong to the walker, never to a method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import PLAIN, Shapes
from sparsekit.pattern import NM, Pattern
from sparsekit.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sparsekit.models.linears import Linear


class MethodOptions(BaseModel):
    """Options of a method, written beside its name in a recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Options = TypeVar("Options", bound=MethodOptions)


@dataclass(frozen=True)
class LinearInfo:
    """A target linear as the plan sees it, before any weight is read."""

    name: str
    block: int
    out_features: int
    in_features: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Pruned:
    """Result of pruning one linear: `weight` is zero wherever `keep` is False."""

    weight: Tensor  # [out, in], any float dtype; the walker casts it to the checkpoint's
    keep: Tensor  # [out, in] bool
    notes: tuple[str, ...] = ()  # what the user should know, such as a damping that had to be raised


class Stat(ABC):
    """A streaming statistic of one linear's input. Sums are float64, independent of the batch split.

    Or of the gradients of the loss with respect to the linear's weight, or of what flows through a block, see `of`.
    """

    of: ClassVar[Literal["inputs", "gradients", "flows"]] = "inputs"
    """What `update` is given: inputs x [tokens, in]; the gradient [out, in] of one sample's mean next-token loss; or
    the hidden states in front of and behind a block, [2, tokens, hidden]."""

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features
        self.tokens = 0

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add one sample, see `of`, in the dtype the model computes in."""

    @abstractmethod
    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add `scale` times what `other`, a statistic of the same kind, has seen."""

    @abstractmethod
    def reordered(self, order: Tensor) -> Self:
        """Return what it would be had every input `x` been `x[:, order]`; `order: [in]` is a permutation."""

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        """Return about how much memory one statistic of inputs takes; gradients are counted as they come."""
        return 8 * in_features


@dataclass(frozen=True)
class TokenNeed:
    """Calibration tokens per input channel of a linear: fewer than `least` are refused, than `advised` warned of."""

    least: float
    advised: float


Stats = Mapping[str, Stat]
Level = Callable[[Pattern, int], Pruned]
"""`at(pattern, budget)`: the linear at one sparsity level, exactly `budget` weights kept."""


class Method(ABC, Generic[Options]):
    """What methods of every room have: options from the recipe, a seed, and statistics of the inputs they read."""

    options_type: ClassVar[type[MethodOptions]] = MethodOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics it reads; none means that no calibration data is used."""

    def __init__(self, options: Options, seed: int) -> None:
        self.options = options
        self.seed = seed


@dataclass(frozen=True)
class Probes:
    """Calibration text that losses of the dense model, their gradients, or predictions of changed ones are computed on.

    Attributes:
        samples, sequence_length: The text.
        own_dtype: Compute in the model's own dtype, several times faster, instead of float32, where a loss answers to
            changes that rounding would hide.
        searched_tokens, searched_seconds: What a search runs through the model, for the estimate; one of both.
    """

    samples: int
    sequence_length: int
    own_dtype: bool = False
    searched_tokens: int = 0
    searched_seconds: float = 0.0


class LayerPruner(Method[Options]):
    """Chooses which weights of a linear stay, and may change the ones that do."""

    nested: ClassVar[bool] = False
    """Whether a level keeps only what every denser level of the same `fit` keeps, with the same values."""
    tokens: ClassVar[TokenNeed | None] = None
    """Calibration tokens that `fit` must or should have."""

    def probes(self) -> Probes | None:
        """Return the text for the statistics of gradients among `needs`; None: it needs no gradients.

        Gradients are those of the dense model, as the stage finds it, whatever `propagate` says.
        """
        return None

    @abstractmethod
    def fit(self, linear: LinearInfo, weight: Tensor, stats: Stats) -> Level:
        """Do the expensive part once for `weight: [out, in]` (float32, read only); return any level cheaply.

        Two linears of a block are pruned side by side, in threads: keep nothing in the pruner itself.
        """

    @property
    def permutes(self) -> bool:
        """Whether it reorders inputs; needs an N:M pattern and a family whose roles are known."""
        return False

    def order(self, linear: LinearInfo, weight: Tensor, pattern: NM, sets: Tensor, stats: Stats) -> Tensor:
        """Return the order in which the inputs of a linear suit the pattern best: [in] int64, old input per place.

        Asked of a pruner that `permutes`, for linears whose inputs other linears of the block make, before anything
        of the block is pruned. The dense block is then reordered, with what makes the inputs, and the statistics too:
        what follows need not know.

        Args:
            linear: The linear.
            weight: [out, in] float32, dense, read only.
            pattern: The stage's.
            sets: [sets, copies, size], all inputs: they change places inside their set only, in all copies alike.
            stats: Statistics of the inputs as they stand.
        """
        raise NotImplementedError


class MaskRefiner(Method[Options]):
    """Improves a mask at the same number of kept weights."""

    def check(self, pattern: Pattern) -> None:
        """Raise PlanError for a pattern that this method cannot refine; asked before anything is read."""

    @abstractmethod
    def refine(self, linear: LinearInfo, weight: Tensor, start: Pruned, pattern: Pattern, stats: Stats) -> Pruned:
        """Return as many kept weights as `start` in the same pattern, each with its value in `weight: [out, in]`.

        `weight` is the dense one, float32, read only: values that a pruner has moved belong to the mask they were
        solved for. An update in the same stage solves for the new mask.
        """


class WeightUpdate(Method[Options]):
    """Moves the kept weights of a given mask so that the linear's outputs change less."""

    tokens: ClassVar[TokenNeed | None] = None
    """Calibration tokens that `update` must or should have."""

    @abstractmethod
    def update(self, linear: LinearInfo, weight: Tensor, start: Pruned, stats: Stats) -> Pruned:
        """Return new values for the mask of `start`; `weight: [out, in]` is the dense one, float32, read only."""


class WholeModel(ABC):
    """All of the dense model in memory, and some calibration samples; in float32, unless its probes say otherwise."""

    @abstractmethod
    def weight(self, linear: LinearInfo) -> Tensor:
        """Return the weight of a linear as it is now, [out, in], read only."""

    @abstractmethod
    def replace(self, linear: LinearInfo, weight: Tensor) -> None:
        """Give a linear `weight: [out, in]` until it is replaced again."""

    @abstractmethod
    def tokens(self, sample: int) -> Tensor:
        """Return the ids of a sample, [sequence_length]."""

    @abstractmethod
    def logits(self, sample: int) -> Tensor:
        """Return what the model as it is now predicts, [sequence_length, vocabulary]; threads may ask side by side."""

    @abstractmethod
    def omit(self, blocks: Collection[int], silent: Collection[LinearInfo] = ()) -> None:
        """Predict without these blocks, and with zeros as the outputs of the `silent` linears; until asked again."""

    @abstractmethod
    def loss(self, linear: LinearInfo, weight: Tensor, sample: int) -> float:
        """Return the mean loss (nats per token) of one sample while `linear` has `weight`; then its own is back.

        Cheapest where the linears come in the order of the model.
        """


@dataclass(frozen=True)
class AllocationContext:
    """What an allocator may look at, and where it says what it saw."""

    linears: Sequence[LinearInfo]
    pattern: Pattern
    visit: Callable[[frozenset[str]], Iterator[tuple[LinearInfo, Tensor, Stats]]]
    """Walk the dense model once: (linear, its weight [out, in] float32, the statistics asked for)."""
    pruner: LayerPruner[Any]
    """The pruner whose budgets are asked for; what it `needs` may be asked for in a visit."""
    whole: Callable[[], AbstractContextManager[WholeModel]]
    """Load the whole model with the samples of `Allocator.probes`."""
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    """For the report: quantity -> block, linear or `all` -> value, few enough to read."""
    reporter: Reporter = field(default_factory=Silent)
    """Told how a long allocation goes on."""
    folder: Path | None = None
    """Where an allocator may keep files; a run that is given the same folder again finds them. None: it keeps none."""
    identity: Mapping[str, JSON] = field(default_factory=dict)
    """What the model, the calibration text and the stage's pruner are, for files that outlive the run."""
    dtype: torch.dtype | None = None
    """What the model is stored in; None: float32."""


class Allocator(Method[Options]):
    """Distributes a budget over linears; `needs` are what it asks `context.visit` for, beside what the pruner needs."""

    looks: ClassVar[bool] = False
    """Whether it looks at the model; a dry run leaves such an allocation out."""

    def probes(self) -> Probes | None:
        """Return what it needs `context.whole` for; None: the model is never in memory as a whole."""
        return None

    @abstractmethod
    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Return kept weights per linear name; they sum to `budget` exactly and are multiples of the pattern's unit."""


@dataclass(frozen=True)
class Anatomy:
    """What a reshaper may know of a model before any weight is read.

    Attributes:
        model: The transformers model on meta; its `config` says what it is.
        blocks: Number of decoder blocks.
        linears: All linears of the blocks, in the order of the model.
        prefix: Dotted name of the list of blocks, such as `model.layers`.
        shapes: In what its shapes differ from those of its configuration.
    """

    model: Any
    blocks: int
    linears: Sequence[LinearInfo]
    prefix: str
    shapes: Shapes = PLAIN


class OpenBlock(ABC):
    """A block that a walk has loaded. What is changed in it, or in what enters it, is what later blocks see.

    Attributes:
        index: Its number.
        block: The module; its parameters may be replaced.
        linears: Its linears.
    """

    index: int
    block: nn.Module
    linears: list[Linear]

    @abstractmethod
    def collect(self, linears: Collection[Linear], needs: frozenset[str]) -> dict[str, dict[str, Stat]]:
        """Run the block on all samples; return {linear name: {statistic name: statistic}} of the linears' inputs."""

    @abstractmethod
    def observe(self, paths: Collection[str], name: str) -> dict[str, Stat]:
        """Run the block on all samples; return the statistic `name` of what enters each of these modules.

        Args:
            paths: Relative to the block; the empty one stands for what leaves the block.
            name: Of the statistic.
        """

    @abstractmethod
    def inputs(self, name: str) -> Stat:
        """Return the statistic `name` of the hidden states in front of the block."""

    @abstractmethod
    def map_inputs(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the hidden states in front of the block, [..., tokens, hidden] of each sample, by what it returns."""


@dataclass(frozen=True)
class ReshapeContext:
    """What a reshaper may look at, and where it says what it saw."""

    anatomy: Anatomy
    visit: Callable[[frozenset[str]], Iterator[tuple[LinearInfo, Tensor, Stats]]]
    """Walk the dense model once: (linear, its weight [out, in] float32, the statistics asked for)."""
    flows: Callable[[str], list[Stat]]
    """Walk the dense model once and return a statistic of the hidden states around each block."""
    blocks: Callable[[], Iterator[OpenBlock]]
    """Walk the model once; each block sees what was made of those before it. The files stay as they are."""
    whole: Callable[[], AbstractContextManager[WholeModel]]
    """Load the whole model with the samples of `Reshaper.probes`."""
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    """For the report: quantity -> block, linear or `all` -> value, few enough to read."""
    reporter: Reporter = field(default_factory=Silent)
    """Told how a long choice goes on."""
    folder: Path | None = None
    """Where a reshaper may keep files; a run that is given the same folder again finds them. None: it keeps none."""
    identity: Mapping[str, JSON] = field(default_factory=dict)
    """What the model, the calibration text and the stage are, for files that outlive the run."""


@dataclass(frozen=True)
class NewLinear:
    """A linear as it is to be: `weight: [out, in]` of any size, `bias: [out]`; None: it keeps the one it has, or none.

    Values are cast to the checkpoint's dtype.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What of one block stays; None: all of it.

    Attributes:
        groups: Key-value groups, [kept] int64, ascending.
        neurons: Inputs of the down projection, [kept] int64, ascending.
        channels: Channels of every head, [kept] int64, ascending; whole pairs where positions turn pairs.
    """

    groups: Tensor | None = None
    neurons: Tensor | None = None
    channels: Tensor | None = None

    @property
    def all(self) -> bool:
        """Whether nothing goes."""
        return self.groups is None and self.neurons is None and self.channels is None


@dataclass(frozen=True)
class Reshaped:
    """What is left of a model.

    Attributes:
        blocks: Old blocks in their new order.
        config: Keys of config.json that change, with their new values.
        shapes: In what its shapes differ from those of its configuration; None: as before, for the blocks that stay.
        linears: Called with an old block's number: its linears that change, by name, as they are to be.
        kept: Called with an old block's number: its groups of heads and neurons that stay. All linears that lose rows
            or columns with the others are cut, before those of `linears` are replaced.
        tensors: Called with an old block's number while it is loaded in the anatomy's model, or with None while all
            outside the blocks is: parameters by name, as they are to be, or new ones. None: nothing is changed so.
        notes: What the user should know of it.
    """

    blocks: tuple[int, ...]
    config: Mapping[str, JSON]
    shapes: Shapes | None = None
    linears: Callable[[int], Mapping[str, NewLinear]] = lambda block: {}
    kept: Callable[[int], Kept] = lambda block: Kept()
    tensors: Callable[[int | None], Mapping[str, Tensor]] | None = None
    notes: tuple[str, ...] = ()


class Reshaper(Method[Options]):
    """Makes a smaller dense model of a model. `needs` are statistics that it asks the context for."""

    sums_of: ClassVar[Literal["linears", "stream"]] = "linears"
    """What its gram matrices are of: the inputs of all linears of a block, or the residual stream."""
    keeps_zeros: ClassVar[bool] = False
    """Whether weights that stay keep their values, so that a pruned model stays sparse."""

    @abstractmethod
    def check(self, anatomy: Anatomy) -> None:
        """Raise PlanError or UnsupportedFamily for a model that it cannot do, before any weight is read."""

    def probes(self) -> Probes | None:
        """Return what it needs `context.whole` for; None: the model is never in memory as a whole."""
        return None

    def outline(self, anatomy: Anatomy) -> Reshaped | None:
        """Return what is known of the result before anything is read; None: its size depends on the text.

        What is no saving is refused by it, unless `grows` says otherwise.
        """
        return None

    @property
    def grows(self) -> bool:
        """Whether the user accepts a model of more parameters."""
        return False

    def tokens(self, anatomy: Anatomy) -> int:
        """Return how many calibration tokens `plan` must have."""
        return 0

    @abstractmethod
    def plan(self, context: ReshapeContext) -> dict[str, JSON]:
        """Look at the model and decide; what is decided is journalled, and a run that goes on does not ask again."""

    @abstractmethod
    def apply(self, anatomy: Anatomy, plan: Mapping[str, JSON], folder: Path | None) -> Reshaped:
        """Return what the plan makes of the model; `folder` is the context's, with the files that `plan` kept."""

    def null(self, name: str) -> Options | None:
        """Return options that make this reshaper the null `name` (`uniform` or `random`); None: it has no such null."""
        return None
