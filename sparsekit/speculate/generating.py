"""Speculative decoding inside `model.generate`: its settings, its processors of logits, its streamer; another loop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.errors import UsageError
from sparsekit.lazy import torch
from sparsekit.speculate.cached import CachedModel
from sparsekit.speculate.decoding import SKIP_WINDOW, Mode, Scores, Spoken, Window, speculate
from sparsekit.speculate.verdicts import GREEDY, Likely, Sampling, Verdict

if TYPE_CHECKING:
    from torch import Tensor

_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


@dataclass(frozen=True)
class Drafting:
    """How tokens are drafted and judged.

    Attributes:
        draft: Opens the context in which the model drafts.
        full: Opens the context in which it reads the prompt and verifies.
        window: How far a draft goes.
        threshold: Least probability at which a drafted token stays; None: the output is exactly the full model's.
    """

    draft: Mode
    full: Mode = nullcontext
    window: Window = SKIP_WINDOW
    threshold: float | None = None


def generate(
    model: Any, ids: Tensor, drafting: Drafting, *, streamer: Any = None, settings: Mapping[str, Any] | None = None
) -> tuple[Tensor, Spoken]:
    """Do what `model.generate` does, with drafts.

    Args:
        model: A transformers model.
        ids: The prompt, [1, tokens].
        drafting: How to draft and judge.
        streamer: Gets prompt and tokens as from `model.generate`.
        settings: Options of `model.generate`, such as max_new_tokens, do_sample, temperature.

    Returns:
        Prompt and new tokens [1, tokens], and how they came about. Draws come from torch's own generator.

    Raises:
        UnsupportedFamily: The model's cache cannot take back tokens.
        UsageError: More than one prompt, or a rule for the end of a text that this loop does not know.
    """
    if ids.shape[0] != 1:
        raise UsageError(f"{ids.shape[0]} prompts: drafts are made for one at a time")
    cached = CachedModel(model)
    spoken = Spoken()

    def loop(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Tensor:
        nonlocal spoken
        _require_known(stopping_criteria)
        end = generation_config.eos_token_id
        spoken = speculate(
            cached,
            input_ids[0],
            drafting.draft,
            full=drafting.full,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            window=drafting.window,
            verdict=_verdict(drafting, bool(generation_config.do_sample)),
            scores=_scores(logits_processor),
            end_tokens=tuple(end) if isinstance(end, list) else () if end is None else (end,),
            on_token=(lambda token: None) if streamer is None else lambda token: streamer.put(torch.tensor([token])),
        )
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, input_ids.new_tensor([spoken.ids])], dim=1)

    made: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=streamer, custom_generate=loop, **(settings or {})
    )
    return made, spoken


def _verdict(drafting: Drafting, sample: bool) -> Verdict:
    own: Verdict = Sampling() if sample else GREEDY
    return own if drafting.threshold is None else Likely(drafting.threshold, chooser=own.choose)


def _scores(processors: Any) -> Scores | None:
    """Return what transformers does to logits for the settings at hand; None where that is nothing."""

    def scores(known: Tensor, logits: Tensor) -> Tensor:
        processed: Tensor = processors(known, logits)
        return processed

    return scores if len(processors) else None


def _require_known(criteria: Any) -> None:
    for criterion in criteria:
        if type(criterion).__name__ not in _CRITERIA:
            raise UsageError(
                f"the generation settings end a text by {type(criterion).__name__}, which drafting does not know",
                hint="Generate without drafting, or remove it from generation_config.json.",
            )
