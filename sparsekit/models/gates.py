"""Leaving out the small entries of a signal: the rules, and how a module comes to follow one.

A gate stands at the input of a linear, or at the output of the activation of an MLP's gate. What it drops is zero from
then on, whatever multiplies it: this is the meaning that kernels have to keep to.

The first tokens of a text may be dense, see `Scope`: their activations are unlike all others, or they are a prompt that
entries are chosen by (`OfPrompt`).
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

    def behind(self, prompt: Tensor, real: Tensor | None = None) -> Gate:
        """Return the rule for what follows a prompt; most rules look at each token by itself and stay as they are.

        Args:
            prompt: The signal at its tokens, [..., tokens, width].
            real: Which of them are no padding, [..., tokens] bool; None: all.
        """
        return self

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


@dataclass(frozen=True)
class OfPrompt(Gate):
    """Keep, at all tokens behind a prompt, the `count` entries that the prompt has used most; without one, all.

    Attributes:
        count: At least 1.
    """

    count: int

    def keep(self, x: Tensor) -> Tensor:
        """Return that all entries are kept: there is no prompt to choose by."""
        return torch.ones_like(x, dtype=torch.bool)

    def behind(self, prompt: Tensor, real: Tensor | None = None) -> Gate:
        """Return the rule that keeps what every text's own prompt has used most."""
        if not prompt.shape[-2]:
            return self
        use, tokens = prompt_use(prompt, real)
        kept = torch.zeros_like(use, dtype=torch.bool)
        kept.scatter_(-1, most_used((use / tokens.clamp_min(1)[..., None]).sqrt(), self.count), True)
        return Always((kept | (tokens == 0)[..., None]).unsqueeze(-2))


@dataclass(frozen=True)
class Always(Gate):
    """Keep the same entries of every token; `kept`: bool, [width] or [..., 1, width]."""

    kept: Tensor

    def keep(self, x: Tensor) -> Tensor:
        """Return which entries are kept."""
        return self.kept.expand(x.shape)


def prompt_use(z: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return how much a prompt uses each entry of a signal, the sum over its tokens of (z_tj / |z_t|)^2.

    The sums of a prompt's parts are those of the prompt.

    Args:
        z: [..., tokens, width].
        real: Tokens that are no padding, [..., tokens] bool; None: all.

    Returns:
        [..., width] float32, and the number of tokens counted, [...] int64.
    """
    size = z.to(torch.float32)
    norm = size.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    shares = (size / norm).square()
    if real is None:
        return shares.sum(dim=-2), torch.full(z.shape[:-2], z.shape[-2], device=z.device)
    return torch.where(real[..., None], shares, 0).sum(dim=-2), real.sum(dim=-1)


def most_used(score: Tensor, count: int) -> Tensor:
    """Return the places of the `count` highest of `score: [..., width]`, ascending, int64; of equal ones the first."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def half_normal(share: float) -> float:
    """Return how many deviations this share of a centred Gaussian's sizes does not exceed."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(share, dtype=torch.float64)))


class Scope(threading.local):
    """Which tokens of the signals that pass are thinned out. Every thread has its own state.

    Attributes:
        dense: Leading tokens of each text that stay dense.
        texts: Texts in the batch at hand.
        real: Which of its tokens are no padding, [texts, tokens] bool; None: all, or no rule asks.
        off: No token is thinned out.
    """

    def __init__(self, dense: int = 0) -> None:
        self.dense = dense
        self.texts = 1
        self.real: Tensor | None = None
        self.off = False

    def thinned(self, gate: Gate, x: Tensor) -> Tensor:
        """Return `x: [texts, tokens, width]` or [texts * tokens, width] with small entries left out."""
        if self.off:
            return x
        dense = self.dense
        if not dense:
            return gate(x)
        by_text = x.dim() > 2 or x.shape[0] % self.texts
        whole = x if by_text else x.reshape(self.texts, -1, x.shape[-1])
        first, rest = whole[..., :dense, :], whole[..., dense:, :]
        rule = gate.behind(first, None if self.real is None else self.real[..., :dense])
        return torch.cat([first, rule(rest)], dim=-2).reshape(x.shape)


@dataclass(frozen=True)
class Placed:
    """A gate and where it stands.

    Attributes:
        kind: At the output of an activation (`gate`), or at the input of a linear.
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
