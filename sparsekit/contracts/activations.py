"""Calibrators of activation sparsity: which entries of a signal are small enough to be left out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sparsekit.contracts.basics import LinearInfo, Method, Options, Stats

if TYPE_CHECKING:
    from torch import Tensor

SignalKind = Literal["input", "gate", "neurons"]
"""`input`: what a linear multiplies. `gate`: the activated gate of an MLP, which `up` is multiplied by. `neurons`: what
an MLP's `down` multiplies, where an entry that goes takes all weights of its neuron with it."""
Rule = Literal["threshold", "top_k", "gaussian", "prompt"]
"""How entries are chosen when the model runs, see `models.gates`; all but `prompt` at every token by itself."""


@dataclass(frozen=True)
class Site:
    """A signal that can be thinned out.

    Attributes:
        name: Of the linear whose input it is, or of the module whose output it is.
        kind: Which signal it is.
        block: Number of the block.
        width: Entries of the signal.
        skips: Linears whose weights are not read where an entry is dropped: columns of an input, columns of `down` and
            rows of `up` for a gate, those and the rows of `gate` for neurons.
        role: What the linear is in its block, such as `query`; None where the family is not known.
        up: Gate sites: name of the linear that the gate is multiplied with; the last `width` of its outputs count.
    """

    name: str
    kind: SignalKind
    block: int
    width: int
    skips: tuple[LinearInfo, ...]
    role: str | None = None
    up: str | None = None

    @property
    def numel(self) -> int:
        """Number of weights that are skipped when every entry is dropped."""
        return sum(linear.numel for linear in self.skips)


@dataclass(frozen=True)
class Remainder:
    """What stands in for the entries that are dropped.

    Attributes:
        sparsity: Share of the entries to drop; the product takes the rest of the cost.
        left, right: [out, rank], [rank, in]: what is dropped goes through `left @ right`.
    """

    sparsity: float
    left: Tensor
    right: Tensor


class ActivationCalibrator(Method[Options]):
    """Says how much an entry matters; entries that matter least are dropped. Changes no weight."""

    kinds: ClassVar[frozenset[SignalKind]] = frozenset({"input"})
    """Signals that it thins out."""
    rule: ClassVar[Rule] = "threshold"
    """How entries are chosen when the model runs."""
    least_coverage: ClassVar[float] = 0.9
    """Share of the blocks' linear weights that its sites must be able to skip, unless the stage says otherwise."""

    def covers(self, site: Site) -> bool:
        """Return whether it thins out this signal; stages narrow it by `targets` and `ignore`."""
        return site.kind in self.kinds

    @abstractmethod
    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return w of the score |a_j| w_j by which entries are compared, [width], not negative; None: all ones.

        Args:
            site: The signal.
            weight: [out, width] float32, read only: of the linear that multiplies it; of `down` for a gate.
            stats: Statistics named by `needs`, of the outputs of `up`; nothing for an input.
        """

    def remainder(self, site: Site, weight: Tensor, sparsity: float) -> Remainder | None:
        """Return what stands in for dropped entries at this share of the cost saved; None: nothing."""
        return None
