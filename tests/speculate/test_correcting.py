"""Sirius: a sparse model speaks, the full one corrects it every few tokens."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from sparsekit.models.structure import find_stack
from sparsekit.speculate.cached import CachedModel
from sparsekit.speculate.decoding import Window, speculate
from sparsekit.speculate.verdicts import Likely
from tests.speculate.support import model, plain
from tests.support import tiny

COUNT = 24
WINDOW = Window(4, confidence=0.0)


def sparse(made, quantile=0.7):
    """Return what opens a context in which small inputs of every linear in the blocks are skipped."""

    def mask(module, args):
        x = args[0]
        return (x * (x.abs() > x.abs().float().quantile(quantile, dim=-1, keepdim=True)), *args[1:])

    stack = find_stack(made)
    modules = [linear.module for index in range(len(stack.blocks)) for linear in stack.linears(index)]

    @contextmanager
    def mode():
        hooks = [module.register_forward_pre_hook(mask) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return mode


def correct(made, ids, *, threshold=0.1, count=COUNT, draft=None, **options):
    cached = CachedModel(made)
    got = speculate(
        cached, ids, draft or sparse(made), max_new_tokens=count, window=WINDOW, verdict=Likely(threshold), **options
    )
    assert cached.lengths == [len(ids) + len(got.ids) - 1] * len(cached.lengths)
    return got


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma2"])
def test_nothing_likely_enough_is_the_full_model(family):
    made = model(family)
    for seed in range(3):
        ids = tiny.ids(1, 6, seed=seed)[0]
        got = correct(made, ids, threshold=1.01)
        assert got.ids == plain(made, ids, COUNT)
        assert got.accepted == 0
        assert got.verifications == COUNT - 1


def test_everything_likely_enough_is_the_sparse_model_with_one_full_token_a_window():
    made = model("llama")
    ids = tiny.ids(1, 6)[0]
    got = correct(made, ids, threshold=0.0, count=21)
    assert (got.drafted, got.accepted, got.verifications) == (16, 16, 4)
    known = ids
    for place, token in enumerate(got.ids):
        with torch.inference_mode():
            if place % 5 == 0:  # the prompt's, and the one behind each window: full model, cache rewritten by it
                cache = None
                said = made(input_ids=known[None]).logits[0, -1].argmax()
            else:
                if cache is None:
                    cache = made(input_ids=known[None, :-1], use_cache=True).past_key_values
                with sparse(made)():
                    said = made(input_ids=known[None, -1:], past_key_values=cache).logits[0, -1].argmax()
        assert int(said) == token
        known = torch.cat([known, said[None]])


def test_what_stays_is_likely_and_what_follows_is_the_full_models():
    made = model("llama", seed=3)
    ids = tiny.ids(1, 6)[0]
    said, windows = [], []

    @contextmanager
    def watched():
        windows.append(len(said))
        with sparse(made)():
            yield

    got = correct(made, ids, draft=watched, on_token=said.append)
    assert 0 < got.accepted < got.drafted
    with torch.no_grad():
        logits = made(input_ids=torch.cat([ids, torch.tensor(said)])[None]).logits[0, len(ids) - 1 : -1]
    likely = (logits / 0.6).softmax(-1).gather(-1, torch.tensor(said)[:, None])[:, 0]
    following = {0, *(start - 1 for start in windows[1:]), COUNT - 1}  # of the prompt, and the last of each window
    for place, token in enumerate(said):
        assert token == int(logits[place].argmax()) if place in following else likely[place] >= 0.1


def test_an_end_in_a_rejected_tail_does_not_stop():
    made = model("llama")
    ids = tiny.ids(1, 6)[0]
    text = plain(made, ids, COUNT)
    end = next(token for token in range(4, tiny.VOCAB) if token not in text)
    drafts = 0

    @contextmanager
    def says_end():
        nonlocal drafts
        drafts += 1

        def say(module, args, out):
            out.logits[..., end] = 1e4

        hook = made.register_forward_hook(say)
        yield
        hook.remove()

    got = correct(made, ids, threshold=0.9, draft=says_end, end_tokens=(end,))
    assert got.ids == text
    assert drafts == COUNT - 1
    assert correct(made, ids, threshold=0.0, draft=says_end, end_tokens=(end,)).ids == [text[0], end]
