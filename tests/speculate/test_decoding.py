"""Drafting and verifying: the full model's own text, whatever drafts; windows, ends, rollbacks, distributions."""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext

import pytest
import torch
from scipy.stats import chisquare

from sparsekit.errors import UnsupportedFamily
from sparsekit.speculate.cached import CachedModel
from sparsekit.speculate.decoding import Window, speculate
from sparsekit.speculate.skipping import Skipper, Skips
from sparsekit.speculate.verdicts import Sampling
from tests.speculate.support import SLIDING, model, plain
from tests.support import tiny

COUNT = 24
FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma2", "mistral", "qwen3_moe", "gpt_oss", "opt", "bloom")


def drawn(blocks: int, seed: int) -> Skips:
    """Return a random skip set."""
    chance = random.Random(seed)
    inner = range(1, blocks - 1)
    return Skips(tuple(b for b in inner if chance.random() < 0.5), tuple(b for b in inner if chance.random() < 0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_the_full_model(family):
    made = model(family)
    skipper = Skipper(made)
    drafted = accepted = 0
    for seed in range(3):
        ids = tiny.ids(1, 5 + seed, seed=seed)[0]
        want = plain(made, ids, COUNT)  # beyond the window of sliding attention
        for tokens, confidence in ((1, 0.0), (4, 0.0), (25, 0.3)):
            draft = skipper.skipping(drawn(5, seed + tokens))
            got = speculate(CachedModel(made), ids, draft, max_new_tokens=COUNT, window=Window(tokens, confidence))
            assert got.ids == want
            drafted, accepted = drafted + got.drafted, accepted + got.accepted
    assert accepted > 0
    assert accepted < drafted or family == "bloom", "nothing was ever taken back"


def test_windows_of_sliding_attention_are_passed():
    assert all(model(family).config.sliding_window < COUNT for family in SLIDING)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_nothing_skipped_is_accepted_whole(family):
    made = model(family)
    ids = tiny.ids(1, 7)[0]
    got = speculate(
        CachedModel(made), ids, Skipper(made).skipping(Skips()), max_new_tokens=21, window=Window(4, confidence=0.0)
    )
    assert got.ids == plain(made, ids, 21)
    assert (got.drafted, got.accepted, got.verifications) == (16, 16, 4)  # 1 of the prompt, 4 times 4 + 1


@pytest.mark.parametrize("count", range(1, 9))
def test_it_stops_at_the_length_asked_for_within_a_window(count):
    made = model("llama")
    ids = tiny.ids(1, 7)[0]
    cached = CachedModel(made)
    got = speculate(cached, ids, nullcontext, max_new_tokens=count, window=Window(5, 0.0))
    assert got.ids == plain(made, ids, count)
    assert cached.lengths == [len(ids) + count - 1] * 5


@pytest.mark.parametrize("place", range(8))
def test_an_end_token_anywhere_in_a_window_ends_the_text(place):
    made = model("llama", seed=4)
    ids = tiny.ids(1, 7)[0]
    text = plain(made, ids, 12)
    assert len(set(text)) > 3
    end = text[place]
    said = []
    for draft in (nullcontext, Skipper(made).skipping(Skips((1, 3), (2,)))):
        cached = CachedModel(made)
        got = speculate(
            cached, ids, draft, max_new_tokens=12, window=Window(5, 0.0), end_tokens=(end, 95), on_token=said.append
        )
        assert got.ids == text[: text.index(end) + 1] == plain(made, ids, 12, eos_token_id=[end, 95])
        assert cached.lengths == [len(ids) + len(got.ids) - 1] * 5
        assert said == got.ids
        said.clear()


def test_an_end_token_that_is_taken_back_ends_nothing():
    made = model("llama")
    ids = tiny.ids(1, 6)[0]
    text = plain(made, ids, COUNT)
    end = next(token for token in range(4, tiny.VOCAB) if token not in text)

    @contextmanager
    def says_end():
        def say(module, args, out):
            out.logits[..., end] = 1e4

        hook = made.register_forward_hook(say)
        yield
        hook.remove()

    got = speculate(CachedModel(made), ids, says_end, max_new_tokens=COUNT, end_tokens=(end,))
    assert got.ids == text
    assert got.accepted == 0
    assert got.drafted == got.verifications - 1  # each draft stops at its end token; the last window has no room


def test_the_cache_holds_the_certain_tokens_after_every_rollback():
    made = model("qwen3")
    cached = CachedModel(made)
    ids = tiny.ids(1, 6)[0]
    skipping = Skipper(made).skipping(Skips((1, 2), (3,)))
    said, windows = [], []

    @contextmanager
    def watched():
        assert cached.lengths == [len(ids) + len(said) - 1] * 5
        with skipping():
            yield
        windows.append(cached.lengths)

    speculate(cached, ids, watched, max_new_tokens=COUNT, window=Window(5, 0.0), on_token=said.append)
    assert any(lengths[0] > lengths[1] == lengths[2] for lengths in windows), "no layer was skipped"


def test_drafts_end_when_they_are_unsure():
    made = model("llama")
    ids = tiny.ids(1, 6)[0]
    drafted = [
        speculate(CachedModel(made), ids, nullcontext, max_new_tokens=COUNT, window=Window(5, confidence)).drafted
        for confidence in (0.0, 0.1, 1.1)
    ]
    assert drafted[0] > drafted[1] > drafted[2]
    assert drafted[2] == COUNT // 2 - 1  # one token a window, and one behind it


# --- sampling ----------------------------------------------------------------------------------------------
TINY = {"vocab_size": 5, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def test_draws_have_the_distribution_of_the_full_model():
    """Pairs of tokens of one window, counted against their probabilities; what the draft would say is far off."""
    made = model("llama", blocks=3, branches=1.0, **TINY)
    ids = torch.tensor([1, 4, 2])
    skipping = Skipper(made).skipping(Skips((1,), (1,)))
    verdict = Sampling(torch.Generator().manual_seed(7))
    draws, accepted, drafted = 1500, 0, 0
    counts = torch.zeros(5, 5, dtype=torch.float64)
    for _ in range(draws):
        got = speculate(
            CachedModel(made), ids, skipping, max_new_tokens=4, window=Window(3, 0.0), verdict=verdict,
            scores=lambda known, logits: logits / 1.5,
        )  # fmt: skip
        counts[got.ids[1], got.ids[2]] += 1
        drafted, accepted = drafted + got.drafted, accepted + got.accepted
    assert 0.1 < accepted / drafted < 0.95
    assert chisquare(*merged(counts, pairs(made, ids, 1.5, nullcontext))).pvalue > 1e-3
    assert chisquare(*merged(counts, pairs(made, ids, 1.5, skipping))).pvalue < 1e-9


def pairs(made, ids, temperature, mode):
    """Return the probabilities [5, 5] of the second and third token in a mode, behind a first from the full model."""

    def following(*known):
        tokens = torch.cat([ids, torch.tensor(known, dtype=torch.long)])
        return (made(input_ids=tokens[None]).logits[0, -1] / temperature).double().softmax(-1)

    with torch.no_grad():
        first = following()
        with mode():
            after = [following(a) for a in range(5)]
            then = [torch.stack([following(a, b) for b in range(5)]) for a in range(5)]
    return sum(first[a] * after[a][:, None] * then[a] for a in range(5))


def merged(counts, shares):
    """Return counts and expectations as rows, what is expected less than 8 times put together."""
    counts, expected = counts.flatten(), shares.flatten() * counts.sum()
    rare = expected < 8
    rows = (torch.cat([x[~rare], x[rare].sum()[None]]).numpy() for x in (counts, expected))
    return tuple(row if expected[rare].sum() else row[:-1] for row in rows)


def test_a_verdict_draws_from_p_whatever_q():
    p, q = (torch.rand(4, 7, generator=torch.Generator().manual_seed(s)).log() * 2 for s in (1, 2))
    q[0, 3] = p[1, 2] = -torch.inf  # never drafted; never said
    verdict = Sampling(torch.Generator().manual_seed(3))
    counts, reached = torch.zeros(4, 7, dtype=torch.float64), torch.zeros(4)
    for _ in range(6000):
        chosen = [verdict.choose(row) for row in q[:3]]
        drafted = [token for token, _ in chosen]
        accepted, following = verdict.judge(p, drafted, [from_ for _, from_ in chosen])
        for place, token in enumerate([*drafted[:accepted], following]):
            counts[place, token] += 1
            reached[place] += 1
    assert counts[1, 2] == 0
    assert reached[0] > reached[1] > reached[2] > reached[3] > 300
    for row, share in zip(counts, p.double().softmax(-1), strict=True):
        assert chisquare(*merged(row, share)).pvalue > 1e-3


def test_draws_follow_their_generator():
    made = model("llama")
    ids = tiny.ids(1, 6)[0]
    texts = [
        speculate(
            CachedModel(made),
            ids,
            nullcontext,
            max_new_tokens=12,
            verdict=Sampling(torch.Generator().manual_seed(seed)),
        ).ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


# --- caches that cannot be cropped -------------------------------------------------------------------------
def test_caches_that_cannot_forget_are_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    with pytest.raises(UnsupportedFamily, match=r"Mamba.* recurrent state.*taken back"):
        CachedModel(mamba)
    hybrid = model("qwen3")
    hybrid.config.layer_types = ["linear_attention"] + ["full_attention"] * 4
    with pytest.raises(UnsupportedFamily, match="recurrent state"):
        CachedModel(hybrid)
    hybrid.config.layer_types = ["chunked_attention"] * 5
    hybrid.config.attention_chunk_size = 8
    with pytest.raises(UnsupportedFamily, match="in chunks"):
        CachedModel(hybrid)


def test_a_model_that_leaves_the_cache_empty_is_refused():
    made = model("llama")
    cached = CachedModel(made)
    own = made.model.layers[2].self_attn.forward
    made.model.layers[2].self_attn.forward = lambda *args, past_key_values=None, **kwargs: own(*args, **kwargs)
    with pytest.raises(UnsupportedFamily, match=r"keeps \[0, 7\] tokens of 7"):
        speculate(cached, tiny.ids(1, 7)[0], nullcontext, max_new_tokens=3)
