"""Calibration text written by the model itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekit.data import TextSpec, load_blocks, write_blocks
from sparsekit.errors import CalibrationError
from sparsekit.progress import Silent


class Tokens:
    """What is asked of a tokenizer here."""

    def __init__(self, bos=1, eos=2):
        self.bos_token_id, self.eos_token_id = bos, eos


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()


def write(model, tokenizer=None, **changes):
    wanted = {"samples": 5, "sequence_length": 12, "seed": 0, "reporter": Silent(), **changes}
    return write_blocks(model, tokenizer or Tokens(), **wanted)


def test_is_of_the_asked_size_begins_with_the_start_token_and_repeats(model):
    blocks = write(model)
    assert blocks.ids.shape == (5, 12)
    assert blocks.ids[:, 0].tolist() == [1] * 5
    assert len({tuple(row.tolist()) for row in blocks.ids}) == 5
    assert write(model).fingerprint == blocks.fingerprint
    assert write(model, seed=1).fingerprint != blocks.fingerprint
    assert write(model, Tokens(bos=None)).ids[:, 0].tolist() == [2] * 5


def test_a_sample_does_not_depend_on_how_many_there_are(model):
    many = write(model, samples=40).ids  # more than are continued together
    assert torch.equal(many[:5], write(model).ids)


def test_tokens_are_drawn_from_the_models_own_distribution(model):
    """Frequencies of the second token: softmax of the logits at the first temperature, 2."""
    drawn = Counter(write(model, samples=3000, sequence_length=2).ids[:, 1].tolist())
    with torch.inference_mode():
        chances = (model(torch.tensor([[1]])).logits[0, -1] / 2).softmax(-1)
    expected = chances * 3000
    seen = torch.tensor([drawn.get(token, 0) for token in range(50)], dtype=torch.float32)
    chi_square = float(((seen - expected).square() / expected).sum())
    assert chi_square < 94  # 49 degrees of freedom: passed over by chance once in 10,000


def test_the_tail_is_drawn_at_temperature_one(model):
    """A peaked model: at temperature 1 it repeats its favourite nearly always, at 2 it would not."""
    peaked = LlamaForCausalLM(model.config).eval()
    torch.nn.init.zeros_(peaked.lm_head.weight)
    with torch.no_grad():
        peaked.lm_head.weight[7] = 0
        for block in peaked.model.layers:
            torch.nn.init.zeros_(block.mlp.down_proj.weight)
            torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        peaked.model.embed_tokens.weight.fill_(1.0)
        peaked.lm_head.weight[7] = 9.0 / 32  # logit 9 against 49 zeros: 0.994 at temperature 1, 0.65 at 2
    ids = write(peaked, samples=60, sequence_length=40).ids
    late = float((ids[:, 14:] == 7).float().mean())
    first = float((ids[:, 1] == 7).float().mean())
    assert late > 0.98
    assert first < 0.85


def test_a_tokenizer_without_a_first_token_is_refused(model):
    with pytest.raises(CalibrationError, match="no start-of-text and no end-of-text token"):
        write(model, Tokens(bos=None, eos=None))


def test_quality_is_not_measured_on_it():
    with pytest.raises(CalibrationError, match="serves for calibration only"):
        load_blocks(TextSpec("self"), Tokens(), model_max_length=64, part="held_out")
