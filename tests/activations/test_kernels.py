"""Layers that skip columns compute what the same gates compute by multiplying zeros."""

from __future__ import annotations

import functools

import pytest
import torch

from sparsekit.runtime import gates, native
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


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "qwen3"])
@pytest.mark.parametrize("recipe", ["cats-50", "chess-50"])
def test_neurons_whose_gate_is_dropped_are_not_computed(family, recipe, tmp_path, monkeypatch):
    from sparsekit.runtime import columns

    folder = tiny.save(family, tmp_path / "model")
    thin(folder, tmp_path / "out", recipe, *SETS, "stages.0.min_coverage=0")
    plain, fast = load(tmp_path / "out"), load(tmp_path / "out", packed=True)
    kept, inner = [], columns.linear_rows

    def counting(x, weight, bias, keep):
        kept.append(float(keep.float().mean()))
        return inner(x, weight, bias, keep)

    monkeypatch.setattr(columns, "linear_rows", counting)
    (ids, logits), (ids_, logits_) = generated(plain, 2), generated(fast, 2)
    assert torch.equal(ids, ids_)
    torch.testing.assert_close(logits_, logits, atol=1e-3, rtol=1e-3)
    assert len(kept) == (0 if family == "phi3" else 9 * 3)  # gate and up in one are computed in one
    assert all(0.2 < share < 0.8 for share in kept)


@pytest.mark.skipif(not native.isa().startswith("avx512"), reason="packed columns are used with AVX-512 only")
def test_zero_weights_and_small_inputs_are_skipped_together(tmp_path, monkeypatch):
    from sparsekit.runtime import columns

    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, **wide)
    sets = ("stages.1.allocate=uniform", "stages.1.tolerance=0.05", "stages.1.sparsity=0.6")
    thin(folder, tmp_path / "out", "wanda-50-teal-40", *sets)
    monkeypatch.setattr(columns, "_APART", 0.5)  # records of so few outputs hardly save a byte
    plain, fast = load(tmp_path / "out"), load(tmp_path / "out", packed=True)
    calls, inner = [], columns.linear_columns_packed

    def counting(x, *rest):
        calls.append(x.shape)
        return inner(x, *rest)

    monkeypatch.setattr(columns, "linear_columns_packed", counting)
    assert gates.describe(fast).kernels == frozenset(gates.describe(fast).file.gates)
    ids = tiny.ids(1, 8)
    with torch.no_grad():
        first, first_ = plain(ids, use_cache=True), fast(ids, use_cache=True)
        for model in (plain, fast):
            gates.describe(model).scope.generating = True
        step, step_ = (
            model(ids[:, :1], past_key_values=each.past_key_values, use_cache=True).logits
            for model, each in ((plain, first), (fast, first_))
        )
    assert len(calls) == 21
    scale = float(step.abs().max())
    torch.testing.assert_close(step_.float() / scale, step.float() / scale, atol=5e-2, rtol=0)
