"""What all methods share: options, statistics, and what they may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
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
    def watch(self, inputs: Mapping[str, Stat], outputs: Mapping[str, Stat] = MappingProxyType({})) -> dict[str, Stat]:
        """Run the block on all samples as far as needed; return the statistics with what they have seen.

        Args:
            inputs: Name of a linear of the block -> statistic of its inputs.
            outputs: Path of a module, relative to the block -> statistic of what it returns.
        """

    @abstractmethod
    def sequence(self) -> list[list[Linear]]:
        """Return the block's linears in the order they run in; those that get the same input are together."""

    @abstractmethod
    def outputs(self) -> list[Tensor]:
        """Run the block on all samples; return what leaves it, [..., tokens, hidden] of each of this rank's."""

    @abstractmethod
    def inputs(self, name: str) -> Stat:
        """Return the statistic `name` of the hidden states in front of the block."""

    @abstractmethod
    def map_inputs(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the hidden states in front of the block, [..., tokens, hidden] of each sample, by what it returns."""
