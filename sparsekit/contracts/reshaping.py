"""Reshapers: smaller dense models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import PLAIN, Shapes
from sparsekit.contracts.basics import LinearInfo, Method, OpenBlock, Options, Probes, Stat, Stats, WholeModel
from sparsekit.progress import Reporter, Silent

if TYPE_CHECKING:
    from torch import Tensor


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
