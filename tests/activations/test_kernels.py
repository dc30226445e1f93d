"""Layers that skip columns compute what the same gates compute by multiplying zeros."""

from __future__ import annotations

import functools

import pytest
import torch

from sparsekit.runtime import gates
from sparsekit.runtime.columns import GatedColumns
from tests.support import tiny
from tests.support.gated import load, thin

SETS = ("stages.0.allocate=uniform", "stages.0.tolerance=0.08")


@pytest.fixture(scope="module")
def thinned(tmp_path_factory):
    @functools.cache
    def made(family="llama", *sets):
        folder = tmp_path_factory.mktemp(family)
        tiny.save(family, folder / "model")
        thin(folder / "model", folder / "out", "teal-50", *SETS, *sets)
        return folder

    return made


def generated(model, batch: int):
    ids = tiny.ids(batch, 8)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    found = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gemma2"])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_generation_with_kernels_is_generation_with_zeros(family, batch, thinned):
    out = thinned(family) / "out"
    plain, fast = load(out), load(out, packed=True)
    found = gates.describe(fast)
    assert found.kernels == frozenset(found.file.gates)
    assert not gates.describe(plain).kernels
    ids, logits = generated(plain, batch)
    ids_, logits_ = generated(fast, batch)
    assert torch.equal(ids, ids_)
    torch.testing.assert_close(logits_, logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["topk", "gaussian", "rsparse", "wina"])
def test_every_rule_with_kernels(method, thinned):
    out = thinned("llama", f"stages.0.method={method}") / "out"
    (ids, logits), (ids_, logits_) = (generated(load(out, packed=packed), 1) for packed in (False, True))
    assert torch.equal(ids, ids_)
    torch.testing.assert_close(logits_, logits, atol=1e-3, rtol=1e-3)


def test_the_kernels_are_called_for_decoding_only(thinned, monkeypatch):
    from sparsekit.runtime import columns

    model, tokens = load(thinned() / "out", packed=True), []
    inner = columns.linear_columns

    def counting(x, *rest):
        tokens.append(x.shape[1])
        return inner(x, *rest)

    monkeypatch.setattr(columns, "linear_columns", counting)
    generated(model, 1)
    assert tokens == [1] * (9 * 21)  # nine steps behind the prompt, seven linears in three blocks


def test_weights_stored_by_column_are_the_same_weights(thinned, tmp_path):
    model = load(thinned() / "out", packed=True)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer.__dict__["forward"], GatedColumns)
    assert layer.weight.stride() == (1, layer.out_features)
    dense = load(thinned() / "model")
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    model.save_pretrained(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in dense.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_signal_that_loses_little_is_multiplied_as_it_is(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    sets = ("stages.0.sparsity=0.05", "stages.0.tolerance=0.03", "stages.0.allocate=uniform")
    thin(folder, tmp_path / "out", "teal-25", *sets, "calibration.samples=40")
    found = gates.describe(load(tmp_path / "out", packed=True))
    assert len(found.kernels) < len(found.file.gates)
