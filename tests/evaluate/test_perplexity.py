from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from sparsekit.data import TokenBlocks
from sparsekit.data.packing import fingerprint
from sparsekit.errors import CalibrationError, EvaluationError, NonFinite
from sparsekit.evaluate.compare import compare
from sparsekit.evaluate.perplexity import score, standard_error, summarise
from tests.support.byte_model import byte_model


def blocks(samples: int = 5, length: int = 17, seed: int = 1, vocabulary: int = 258) -> TokenBlocks:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (samples, length), generator=generator)
    return TokenBlocks(ids, "random ids", fingerprint(ids), None)


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model(0)


@pytest.fixture(scope="module")
def other() -> Any:
    return byte_model(1)


def reference_log_probabilities(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Log-softmax by hand in float64 from the model's own logits: [length - 1, vocabulary]."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double().numpy()
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_losses_against_float64_by_hand(model: Any) -> None:
    data = blocks()
    losses = score(model, data)
    assert losses.per_token.shape == (5, 16)
    assert losses.per_token.dtype == torch.float64
    expected = np.array(
        [
            [-logp[position, int(ids[position + 1])] for position in range(16)]
            for ids, logp in ((ids, reference_log_probabilities(model, ids)) for ids in data.ids)
        ]
    )
    np.testing.assert_allclose(losses.per_token.numpy(), expected, rtol=1e-5, atol=1e-6)
    result = summarise(losses)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-6)
    block_means = expected.mean(axis=1)
    assert result.stderr == pytest.approx(result.perplexity * block_means.std(ddof=1) / math.sqrt(5), rel=1e-5)
    assert (result.tokens, result.sequence_length, result.source) == (80, 17, "random ids")


@pytest.mark.parametrize("positions_at_once", [1, 3, 16, 1000])
def test_the_result_does_not_depend_on_the_chunk(model: Any, other: Any, positions_at_once: int) -> None:
    data = blocks()
    assert torch.equal(score(model, data, positions_at_once=positions_at_once).per_token, score(model, data).per_token)
    assert compare(model, other, data, positions_at_once=positions_at_once) == compare(model, other, data)


def test_a_model_beside_itself(model: Any) -> None:
    result = compare(model, model, blocks())
    assert result.kl == 0.0
    assert result.ratio == 1.0
    assert result.loss_difference == 0.0
    assert result.loss_difference_stderr == 0.0
    assert result.top1_agreement == 1.0
    assert result.model == result.baseline == summarise(score(model, blocks()))


def test_comparison_against_numpy(model: Any, other: Any) -> None:
    data = blocks(7)
    result = compare(model, other, data)
    losses, reference, kl, agreement = [], [], [], []
    for ids in data.ids:
        q, p = reference_log_probabilities(model, ids), reference_log_probabilities(other, ids)
        rows = np.arange(16)
        losses.append(-q[rows, ids[1:].numpy()])
        reference.append(-p[rows, ids[1:].numpy()])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        agreement.append(p.argmax(axis=1) == q.argmax(axis=1))
    paired = np.array(losses) - np.array(reference)
    assert result.loss_difference == pytest.approx(paired.mean(), rel=1e-4, abs=1e-6)
    assert result.ratio == pytest.approx(math.exp(paired.mean()), rel=1e-5)
    assert result.loss_difference_stderr == pytest.approx(paired.mean(axis=1).std(ddof=1) / math.sqrt(7), rel=1e-4)
    assert result.kl == pytest.approx(np.mean(kl), rel=1e-5)
    assert result.kl_stderr == pytest.approx(np.mean(kl, axis=1).std(ddof=1) / math.sqrt(7), rel=1e-4)
    assert result.top1_agreement == pytest.approx(np.mean(agreement))
    assert result.kl > 0


def test_pairing_resolves_what_single_errors_cannot(model: Any) -> None:
    close = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in close.parameters():
            parameter.mul_(1.001)
    result = compare(close, model, blocks(12))
    single = result.model.stderr
    assert single is not None
    assert result.loss_difference_stderr is not None
    assert result.loss_difference_stderr < 0.1 * single / result.model.perplexity
    assert result.kl >= 0


def test_kl_has_a_direction(model: Any, other: Any) -> None:
    forwards, backwards = compare(model, other, blocks()), compare(other, model, blocks())
    assert forwards.kl != pytest.approx(backwards.kl, rel=1e-3)
    assert forwards.ratio == pytest.approx(1 / backwards.ratio)
    assert forwards.top1_agreement == backwards.top1_agreement


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3])
def test_kl_is_never_negative_for_nearly_equal_models(model: Any, scale: float) -> None:
    near = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    result = compare(near, model, blocks())
    assert 0 <= result.kl < max(1e-6, 100 * scale)


def test_bfloat16_logits_are_scored_in_float32(model: Any) -> None:
    half = copy.deepcopy(model).bfloat16()
    data = blocks()
    result = summarise(score(half, data))
    assert result.loss == pytest.approx(summarise(score(model, data)).loss, rel=0.02)
    expected = np.mean(
        [-reference_log_probabilities(half, ids)[np.arange(16), ids[1:].numpy()].mean() for ids in data.ids]
    )
    assert result.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_name_block_and_token(model: Any, other: Any, value: float) -> None:
    broken = copy.deepcopy(model)
    data = blocks(3)
    data.ids[data.ids == 257] = 0
    data.ids[1, 4] = 257  # the mark by which the hook below knows block 1

    def spoil(module: Any, arguments: Any, options: Any, output: Any) -> Any:
        if 257 in options["input_ids"]:
            output.logits[0, 4, 7] = value
        return output

    broken.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(NonFinite, match="logits of block 1, first at token 4"):
        score(broken, data)
    with pytest.raises(NonFinite, match="block 1"):
        compare(broken, other, data)
    with pytest.raises(NonFinite, match="block 1"):
        compare(other, broken, data)


def test_one_block_has_no_standard_error(model: Any, other: Any) -> None:
    assert summarise(score(model, blocks(1))).stderr is None
    result = compare(model, other, blocks(1))
    assert result.kl_stderr is None
    assert result.loss_difference_stderr is None


def test_standard_error_against_numpy() -> None:
    values = torch.rand(9)
    assert standard_error(values) == pytest.approx(values.double().numpy().std(ddof=1) / 3, rel=1e-9)


def test_a_hopeless_model_has_infinite_perplexity_and_no_exception() -> None:
    from sparsekit.evaluate.perplexity import TokenLosses

    result = summarise(TokenLosses(torch.full((2, 3), 1e4, dtype=torch.float64), "x", 4))
    assert result.perplexity == math.inf


def test_blocks_that_cannot_be_scored(model: Any) -> None:
    with pytest.raises(CalibrationError, match="leave nothing to predict"):
        score(model, blocks(length=1))
    with pytest.raises(EvaluationError, match=r"token id .* vocabulary of 258"):
        score(model, blocks(vocabulary=5000))


def test_models_of_other_vocabularies_are_refused(model: Any) -> None:
    wider = byte_model(0, vocabulary=300)
    with pytest.raises(EvaluationError, match="vocabulary has 258 tokens, the baseline's 300"):
        compare(model, wider, blocks())
