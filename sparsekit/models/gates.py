"""Leaving out the small entries of a signal: the rules, and how a module comes to follow one.

A gate stands at the input of a linear, or at the output of the activation of an MLP's gate. What it drops is zero from
then on, whatever multiplies it: this is the meaning that kernels have to keep to.

The first tokens of a text may be dense, see `Scope`: their activations are unlike all others.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.contracts import Remainder, SignalKind
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Gate(ABC):
    """A rule that says which entries of a signal are kept."""

    @abstractmethod
    def keep(self, x: Tensor) -> Tensor:
        """Return which entries of `x: [..., width]` are kept, bool of the same shape; NaN is kept."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x with zeros where an entry is dropped."""
        return torch.where(self.keep(x), x, 0)


@dataclass(frozen=True)
class Threshold(Gate):
    """Keep entry j if |x_j| > t_j; t: [width] or [1] float32."""

    t: Tensor

    def keep(self, x: Tensor) -> Tensor:
        """Return which entries are kept."""
        return ~(x.abs() <= self.t)


@dataclass(frozen=True)
class TopK(Gate):
    """Keep the `count` entries of each token with the largest |x_j| w_j, and those that equal the last of them.

    Attributes:
        count: At least 1.
        w: [width] or [1] float32.
    """

    count: int
    w: Tensor

    def keep(self, x: Tensor) -> Tensor:
        """Return which entries are kept."""
        score = x.abs() * self.w
        if self.count >= x.shape[-1]:
            return torch.ones_like(score, dtype=torch.bool)
        last = score.kthvalue(x.shape[-1] - self.count + 1, dim=-1, keepdim=True).values
        return ~(score < last)


@dataclass(frozen=True)
class Gaussian(Gate):
    """Keep entry j if |x_j| exceeds `deviations` times the root mean square of its token."""

    deviations: float

    def keep(self, x: Tensor) -> Tensor:
        """Return which entries are kept."""
        size = x.abs().to(torch.float32)
        bound = self.deviations * size.square().mean(dim=-1, keepdim=True).sqrt()
        return ~(size <= bound)


def half_normal(share: float) -> float:
    """Return how many deviations this share of a centred Gaussian's sizes does not exceed."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(share, dtype=torch.float64)))


class Scope(threading.local):
    """Which tokens of the signals that pass are thinned out. Every thread has its own state.

    Attributes:
        dense: Leading tokens of each text that stay dense.
        texts: Texts in the batch at hand.
        off: No token is thinned out.
    """

    def __init__(self, dense: int = 0) -> None:
        self.dense = dense
        self.texts = 1
        self.off = False

    def thinned(self, gate: Gate, x: Tensor) -> Tensor:
        """Return `x: [texts, tokens, width]` or [texts * tokens, width] with small entries left out."""
        if self.off:
            return x
        kept = gate(x)
        dense = self.dense
        if not dense:
            return kept
        by_text = x.dim() > 2 or x.shape[0] % self.texts
        whole, part = (x, kept) if by_text else (t.reshape(self.texts, -1, x.shape[-1]) for t in (x, kept))
        return torch.cat([whole[..., :dense, :], part[..., dense:, :]], dim=-2).reshape(x.shape)


@dataclass(frozen=True)
class Placed:
    """A gate and where it stands.

    Attributes:
        kind: At the input of a linear, or at the output of an activation.
        gate: The rule.
        remainder: What stands in for what is dropped.
    """

    kind: SignalKind
    gate: Gate
    remainder: Remainder | None = None


class Gated:
    """The forward of a module with a gate at its input or output."""

    def __init__(self, module: nn.Module, placed: Placed, scope: Scope) -> None:
        self.inner: Callable[..., Tensor] = module.forward
        self.placed = placed
        self.scope = scope

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module."""
        placed, scope = self.placed, self.scope
        if placed.kind == "gate":
            return scope.thinned(placed.gate, self.inner(x, *args, **kwargs))
        kept = scope.thinned(placed.gate, x)
        y = self.inner(kept, *args, **kwargs)
        if placed.remainder is not None and kept is not x:
            y = y + (x - kept) @ placed.remainder.right.T @ placed.remainder.left.T
        return y


def install(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Have a module run `forward`, an attribute that shadows its method; return what undoes it."""
    before: Mapping[str, Any] = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
    module.__dict__["forward"] = forward

    def undo() -> None:
        module.__dict__.pop("forward", None)
        module.__dict__.update(before)

    return undo
