"""Pruners, refiners of masks, updates of kept weights, allocators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsekit.checkpoint.jsonio import JSON
from sparsekit.contracts.basics import LinearInfo, Method, Options, Probes, Stats, TokenNeed, WholeModel
from sparsekit.pattern import NM, Pattern
from sparsekit.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """Result of pruning one linear: `weight` is zero wherever `keep` is False."""

    weight: Tensor  # [out, in], any float dtype; the walker casts it to the checkpoint's
    keep: Tensor  # [out, in] bool
    notes: tuple[str, ...] = ()  # what the user should know, such as a damping that had to be raised


Level = Callable[[Pattern, int], Pruned]
"""`at(pattern, budget)`: the linear at one sparsity level, exactly `budget` weights kept."""


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
