"""Drafting and verifying: several cheap forward passes, then one full one that decides about all their tokens.

**What it does.** The draft is the model itself inside a context manager that makes it cheaper, so both share one cache.
It drafts until it is unsure or the window is full. The full model then runs once over the window, in place of the
draft's cache entries, and a verdict says how many tokens stay and which follows; what is behind them is forgotten.
With exact verdicts (greedy, sampling) the text is that of the full model alone, whatever the draft says.

**Source.** Leviathan et al. 2023, arXiv 2211.17192; with skipped branches as draft: Xia et al. 2024, "SWIFT", arXiv
2410.06916; with correction in place of equality: Zhou et al. 2024, "Sirius", arXiv 2409.03856.

**Cost.** A window of k drafted tokens takes k draft passes of one token and one full pass of k + 1 tokens, and makes
between 1 and k + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsekit.lazy import torch
from sparsekit.speculate.cached import CachedModel
from sparsekit.speculate.verdicts import GREEDY, Verdict

if TYPE_CHECKING:
    from torch import Tensor

Mode = Callable[[], AbstractContextManager[object]]
"""Opens a context in which the model computes in some way."""
Scores = Callable[["Tensor", "Tensor"], "Tensor"]
"""Makes scores [1, vocabulary] of the tokens so far [1, tokens] and logits [1, vocabulary], as a temperature does."""


@dataclass
class Spoken:
    """What was generated, and how.

    Attributes:
        ids: The new tokens; an end token is the last of them.
        drafted: Tokens that were drafted.
        accepted: Of these, how many stayed.
        verifications: Passes of the full model behind the prompt.
    """

    ids: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0


@dataclass(frozen=True)
class Window:
    """How far a draft goes.

    Attributes:
        tokens: At most so many.
        confidence: It ends behind a token when the likeliest one had a lower probability; 0: never.
    """

    tokens: int = 25
    confidence: float = 0.8


SKIP_WINDOW = Window()
"""SWIFT's, for drafts that cost about half of a full pass."""


def speculate(
    model: CachedModel,
    ids: Tensor,
    draft: Mode,
    *,
    max_new_tokens: int,
    full: Mode = nullcontext,
    window: Window = SKIP_WINDOW,
    verdict: Verdict = GREEDY,
    scores: Scores | None = None,
    end_tokens: tuple[int, ...] = (),
    on_token: Callable[[int], None] = lambda token: None,
) -> Spoken:
    """Generate up to `max_new_tokens` tokens, or up to an end token.

    Args:
        model: With an empty cache; afterwards it holds all tokens but the last.
        ids: The prompt, [tokens].
        draft: Opens the context in which the model drafts.
        max_new_tokens: At least 1.
        full: Opens the context in which it reads the prompt and verifies.
        window: How far a draft goes.
        verdict: How tokens are chosen and judged.
        scores: What is done to logits before tokens are chosen, for draft and full model alike; None: nothing.
        end_tokens: A token of these that stays ends the text.
        on_token: Called with each new token as soon as it is certain.

    Raises:
        UnsupportedFamily: The model's cache cannot take back tokens.
    """
    speech = _Speech(model, ids, verdict, scores)
    spoken = Spoken()

    def certain(tokens: list[int]) -> bool:
        """Take tokens up to an end token over into the text; return whether it goes on."""
        for token in tokens:
            spoken.ids.append(token)
            speech.append(token)
            on_token(token)
            if token in end_tokens or len(spoken.ids) == max_new_tokens:
                return False
        return True

    with torch.inference_mode():
        with full():
            first, _ = verdict.choose(speech.score(model.prefill(ids)))
        goes_on = certain([first])
        while goes_on:
            room = max_new_tokens - len(spoken.ids) - 1  # the token behind the accepted ones comes for nothing
            with draft():
                drafted, drawn_from = speech.draft(min(window.tokens, room), window.confidence, end_tokens)
            with full():
                accepted, following = speech.verify(drafted, drawn_from)
            spoken.drafted += len(drafted)
            spoken.accepted += accepted
            spoken.verifications += 1
            goes_on = certain([*drafted[:accepted], following])
            model.forget(len(speech.known) - 1)
    return spoken


class _Speech:
    """The tokens that are certain, and windows behind them."""

    def __init__(self, model: CachedModel, ids: Tensor, verdict: Verdict, scores: Scores | None) -> None:
        self.known = ids  # [tokens]; the last one is not in the cache, once there is one behind the prompt
        self._model = model
        self._verdict = verdict
        self._scores = scores

    def append(self, token: int) -> None:
        """Make a token certain."""
        self.known = torch.cat([self.known, self.known.new_tensor([token])])

    def score(self, logits: Tensor, window: Sequence[int] = ()) -> Tensor:
        """Return scores of the token behind the certain ones and `window`, as `logits: [vocabulary]`."""
        if self._scores is None:
            return logits
        return self._scores(torch.cat([self.known, self.known.new_tensor(window)])[None], logits[None])[0]

    def draft(self, most: int, confidence: float, end_tokens: Collection[int]) -> tuple[list[int], list[Tensor]]:
        """Return up to `most` drafted tokens, and the probabilities that each was chosen by."""
        drafted: list[int] = []
        drawn_from: list[Tensor] = []
        token, start = self.known[-1:], len(self.known) - 1
        while len(drafted) < most:
            logits = self._model.read(token, start + len(drafted))[0]
            chosen, probabilities = self._verdict.choose(self.score(logits, drafted))
            drafted.append(chosen)
            drawn_from.append(probabilities)
            # The unsure token itself is kept: it is there, and checking it costs next to nothing.
            if chosen in end_tokens or float(probabilities.max()) < confidence:
                break
            token = self.known.new_tensor([chosen])
        return drafted, drawn_from

    def verify(self, drafted: list[int], drawn_from: list[Tensor]) -> tuple[int, int]:
        """Run the full model over the window, in place of the draft's cache entries; return its verdict."""
        window = torch.cat([self.known[-1:], self.known.new_tensor(drafted)])
        logits = self._model.read(window, len(self.known) - 1)  # [drafted + 1, vocabulary]
        scores = [self.score(row, drafted[:place]) for place, row in enumerate(logits)]
        return self._verdict.judge(torch.stack(scores), drafted, drawn_from)
