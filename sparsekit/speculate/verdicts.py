"""What the full model makes of a drafted window: how many tokens it accepts, and which comes next.

A verdict sees the scores of the full model at the window's positions (behind the last certain token and behind each
drafted one) and, for exact sampling, the probabilities that each drafted token was drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Verdict(Protocol):
    """How tokens are chosen from scores, and drafted ones judged."""

    def choose(self, scores: Tensor) -> tuple[int, Tensor]:
        """Return a token for `scores: [vocabulary]` and the probabilities it was chosen by, [vocabulary]."""

    def judge(self, scores: Tensor, drafted: list[int], drawn_from: list[Tensor]) -> tuple[int, int]:
        """Return how many of the drafted tokens stay, and the token that follows them.

        Args:
            scores: Of the full model, [drafted + 1, vocabulary]; row i is what token i of the draft is judged by.
            drafted: The tokens.
            drawn_from: What `choose` gave for each of them, [vocabulary] each.
        """


class Greedy:
    """The likeliest token: output is that of the full model alone."""

    def choose(self, scores: Tensor) -> tuple[int, Tensor]:
        """Return the likeliest token."""
        return int(scores.argmax()), scores.softmax(-1)

    def judge(self, scores: Tensor, drafted: list[int], drawn_from: list[Tensor]) -> tuple[int, int]:
        """Accept what the full model would have said itself."""
        said = scores.argmax(-1).tolist()
        accepted = _leading([token == own for token, own in zip(drafted, said, strict=False)])
        return accepted, said[accepted]


GREEDY = Greedy()


@dataclass(frozen=True)
class Sampling:
    """Tokens drawn so that the output has the distribution of the full model alone.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192,
    algorithm 1: a token drawn from q stays with probability min(1, p / q); the first that does not is drawn again from
    max(0, p - q), normalised.

    Attributes:
        generator: Of all draws; None: torch's own.
    """

    generator: Generator | None = None

    def choose(self, scores: Tensor) -> tuple[int, Tensor]:
        """Draw a token from the softmax of `scores: [vocabulary]`."""
        probabilities = scores.softmax(-1)
        return self._draw(probabilities), probabilities

    def judge(self, scores: Tensor, drafted: list[int], drawn_from: list[Tensor]) -> tuple[int, int]:
        """Accept or draw again, position by position."""
        probabilities = scores.softmax(-1)
        for place, (token, q) in enumerate(zip(drafted, drawn_from, strict=True)):
            p = probabilities[place]
            # u in [0, 1), so a token the full model never says (p = 0) never stays.
            if float(torch.rand((), generator=self.generator)) * float(q[token]) >= float(p[token]):
                rest = (p - q).clamp(min=0)
                # p = q up to rounding leaves nothing to draw from, and then p itself is what is meant.
                return place, self._draw(rest if float(rest.sum()) > 0 else p)
        return len(drafted), self._draw(probabilities[-1])

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self.generator))


@dataclass(frozen=True)
class Likely:
    """Tokens that the full model finds likely enough: a correction of the draft, not the full model's own text.

    Source: Zhou et al. 2024, "Sirius: Contextual Sparsity with Correction for Efficient LLMs", arXiv 2409.03856.

    Attributes:
        threshold: Least probability of a token that stays; 0 accepts all, above 1 none.
        temperature: Of the softmax that probability comes from.
        chooser: Chooses the tokens, while drafting and behind the last accepted one.
    """

    threshold: float = 0.1
    temperature: float = 0.6
    chooser: Callable[[Tensor], tuple[int, Tensor]] = GREEDY.choose

    def choose(self, scores: Tensor) -> tuple[int, Tensor]:
        """Return what the chooser says of `scores: [vocabulary]`."""
        return self.chooser(scores)

    def judge(self, scores: Tensor, drafted: list[int], drawn_from: list[Tensor]) -> tuple[int, int]:
        """Accept up to the first token that is too unlikely."""
        rows = (scores[: len(drafted)] / self.temperature).softmax(-1)
        likely = [float(row[token]) >= self.threshold for row, token in zip(rows, drafted, strict=True)]
        accepted = _leading(likely)
        return accepted, self.chooser(scores[accepted])[0]


def _leading(verdicts: list[bool]) -> int:
    """Count the trues in front of the first false."""
    return next((place for place, good in enumerate(verdicts) if not good), len(verdicts))
