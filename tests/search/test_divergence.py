"""Divergence over the likeliest tokens, against the sum over all of them."""

from __future__ import annotations

import pytest
import torch

from sparsekit.search.divergence import divergence, reference, text_reference


def logits(seed, positions=300, vocabulary=1000, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, vocabulary, generator=generator) * scale


def whole(p, q):
    log_p, log_q = torch.log_softmax(p.double(), 1), torch.log_softmax(q.double(), 1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_tokens_it_is_the_divergence(dtype):
    p, q = logits(0).to(dtype), logits(1).to(dtype)
    assert divergence(reference(p, 1000), q) == pytest.approx(whole(p, q), rel=2e-3)


@pytest.mark.parametrize("top", [1, 16, 512, 999])
def test_a_bucket_for_the_rest_never_adds(top):
    p, q = logits(0), logits(1)
    found = divergence(reference(p, top), q)
    assert 0 < found <= whole(p, q) * 1.002


def test_more_tokens_come_closer():
    p, q = logits(0), logits(1)
    found = [divergence(reference(p, top), q) for top in (1, 8, 64, 512, 1000)]
    assert found == sorted(found)


def test_of_itself_it_is_nothing():
    p = logits(0)
    assert abs(divergence(reference(p, 512), p)) < 2e-3


def test_a_shift_of_all_logits_changes_nothing():
    p, q = logits(0), logits(1)
    assert divergence(reference(p + 7, 64), q - 3) == pytest.approx(divergence(reference(p, 64), q), rel=1e-3)


def test_certain_predictions_stay_finite():
    p, q = torch.zeros(4, 600), torch.zeros(4, 600)
    p[:, 3] = 200.0
    q[:, 5] = 200.0
    assert 100 < divergence(reference(p, 512), q) < 250


def test_it_keeps_a_few_bytes_per_position():
    kept = reference(logits(0, vocabulary=2000), 512)
    total = sum(part.numel() * part.element_size() for part in (kept.tokens, kept.log_p, kept.log_tail))
    assert total == 300 * (512 * 6 + 4)


def test_from_the_text_it_is_the_loss():
    ids = torch.randint(0, 1000, (301,), generator=torch.Generator().manual_seed(2))
    q = logits(1)
    wanted = torch.nn.functional.cross_entropy(q, ids[1:])
    assert divergence(text_reference(ids), q) == pytest.approx(float(wanted), rel=1e-5)
