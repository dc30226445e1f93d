"""Tiny models that agree with cheap versions of themselves often enough for drafts to be accepted."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import tiny

SLIDING = ("gemma2", "mistral")


def model(family: str, *, blocks: int = 5, branches: float = 0.25, seed: int = 0, **changes: Any) -> Any:
    """Return a random model whose branches are quiet beside its stream, so that leaving some out changes little."""
    number = (
        "n_layer" if family in ("gpt2", "gptj", "bloom") else "n_layers" if family == "mpt" else "num_hidden_layers"
    )
    made = tiny.build(family, seed=seed, **{number: blocks, **changes})
    made.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "dense.weight", "4h_to_h.weight")):
                parameter.mul_(branches)
    return made


def plain(made: Any, ids: torch.Tensor, count: int, **options: Any) -> list[int]:
    """Return what the model generates by itself behind `ids: [tokens]`."""
    with torch.no_grad():
        out = made.generate(
            ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=count, do_sample=False, **options
        )
    return out[0, len(ids) :].tolist()
