"""A packed checkpoint whose layers multiply with packed weights: what holds for the dense model holds for it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sparsekit.errors import SparsekitError, UsageError
from sparsekit.runtime import buffers, native, ops
from sparsekit.runtime.modules import SparseLinear
from tests.runtime.support import assert_same_weights, both, converted, load
from tests.runtime.test_loading import python
from tests.support import tiny

WIDE = {"hidden_size": 64, "intermediate_size": 128}
pytestmark = pytest.mark.skipif(not native.available(), reason="these tests need the kernels")


@pytest.fixture(autouse=True)
def _packed(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "packed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(dense, packed), bf16."""
    return both("llama", tmp_path_factory.mktemp("llama"), form="auto", **WIDE)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """(dense, packed), fp32: sums differ by their order alone."""
    return both("llama", tmp_path_factory.mktemp("exact"), dtype=torch.float32, **WIDE)


def sparse(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def logits(model):
    with torch.no_grad():
        return model(tiny.ids(2)).logits.float()


def assert_close(left, right, tolerance=None):
    """Logits equal within the rounding of the dtype."""
    a, b = logits(left), logits(right)
    if tolerance is None:
        tolerance = 1e-5 if left.dtype == torch.float32 else 2**-6
    assert a.abs().max() > 0
    assert (a - b).abs().max() <= tolerance * a.abs().max()


# --- families and options ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "form"), [("llama", "nm"), ("gpt2", "auto"), ("mixtral", "bitmask"), ("qwen3_moe", "auto")]
)
def test_families(family, form, tmp_path):
    """Attention and dense layers run packed, GPT-2's transposed ones too; fused experts are unpacked."""
    dense, packed = both(family, tmp_path, form="bitmask" if form == "nm" else form)
    reference, model = load(dense), load(packed)
    assert len(sparse(model)) >= 2
    assert_same_weights(reference, model)
    assert_close(reference, model)


def test_files_do_not_stay_mapped(llama):
    """A norm that lies in a mapped file would keep the packed weights beside it resident a second time."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not list what is mapped")
    _, packed = llama
    model = load(packed)
    assert sparse(model)
    assert str(packed) not in maps.read_text()


@pytest.mark.parametrize("values", ["raw", "int8", "int4"])
def test_int_values_mean_the_same_packed_and_unpacked(values, tmp_path, monkeypatch):
    _, packed = both("llama", tmp_path, form="bitmask", values=values, **WIDE)
    model = load(packed)
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "dense")
    reference = load(packed)
    assert_same_weights(reference, model)
    assert_close(reference, model, 0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied, tmp_path):
    dense, packed = both("llama", tmp_path, tie_word_embeddings=tied)
    model = load(packed)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert_close(load(dense), model)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "auto"}, {"dtype": torch.float32}, {"dtype": torch.float16}, {"dtype": torch.bfloat16},
        {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_from_pretrained(llama, options):
    dense, packed = llama
    reference, model = load(dense, **options), load(packed, **options)
    assert len(sparse(model)) == 21
    assert model.dtype == reference.dtype
    assert_same_weights(reference, model)
    assert_close(reference, model)


def test_a_device_map_of_modules(llama):
    where = {"model": "cpu", "lm_head": torch.device("cpu")}
    assert_close(load(llama[0]), load(llama[1], device_map=where))


def test_layers_on_a_disk_are_unpacked_or_refused(llama, tmp_path, monkeypatch):
    dense, packed = llama
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{number}": "cpu" if number == 0 else "disk" for number in range(3)}
    with pytest.raises(UsageError, match="puts layers elsewhere than on the CPU"):
        load(packed, device_map=where, offload_folder=str(tmp_path))
    monkeypatch.delenv("SPARSEKIT_RUNTIME")
    model = load(packed, device_map=where, offload_folder=str(tmp_path))
    assert not sparse(model)
    assert torch.equal(logits(model), logits(load(dense)))


def test_without_a_wish_layers_run_packed(llama, monkeypatch):
    monkeypatch.delenv("SPARSEKIT_RUNTIME")
    assert len(sparse(load(llama[1]))) == 21


def test_packed_values_stay_narrow_where_that_is_exact(llama):
    model = load(llama[1], dtype=torch.float32)
    assert {buffers.info(layer.packed).dtype for layer in sparse(model)} == {native.DType.BF16}
    assert {layer.weight.dtype for layer in sparse(model)} == {torch.float32}


# --- using it ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate_gives_the_same_tokens(exact, options):
    texts = [load(folder).generate(tiny.ids(2), max_new_tokens=12, do_sample=False, **options) for folder in exact]
    assert torch.equal(*texts)


def test_pipeline(exact):
    texts = []
    for folder in exact:
        write = pipeline("text-generation", model=str(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
        texts.append(write("abc", max_new_tokens=8, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]


def test_lm_eval_model(exact):
    hf = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, ("ab c", " def"), number) for number in range(2)]
    scores = []
    for folder in exact:
        model = hf.HFLM(pretrained=str(folder), device="cpu", dtype="auto", batch_size=1)
        scores.append([value for value, _ in model.loglikelihood(requests, disable_tqdm=True)])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_compiled_whole(llama):
    model = load(llama[1])
    ops.register()
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled), expected)


def test_copies_are_independent(llama):
    model = load(llama[1])
    expected = logits(model)
    twin = copy.deepcopy(model)
    restored = pickle.loads(pickle.dumps(model))
    for other in (twin, restored):
        assert torch.equal(logits(other), expected)
        for a, b in zip(sparse(model), sparse(other), strict=True):
            assert a.packed.data_ptr() != b.packed.data_ptr()
    sparse(twin)[0].weight = torch.zeros_like(sparse(twin)[0].weight)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)


def test_state_dict_is_the_dense_models(llama):
    dense, packed = llama
    reference, model = load(dense), load(packed)
    assert model.state_dict().keys() == reference.state_dict().keys()
    other = AutoModelForCausalLM.from_config(reference.config, dtype=torch.bfloat16).eval()
    other.load_state_dict(model.state_dict())
    assert_same_weights(reference, other)
    changed = {name: value * 2 for name, value in reference.state_dict().items()}
    model.load_state_dict(changed)
    reference.load_state_dict(changed)
    assert_same_weights(reference, model)


def test_state_dicts_that_do_not_fit_are_refused(llama):
    model = load(llama[1])
    state = model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=name):
        model.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict({**state, name: state[name][:-1]})


def test_other_dtypes(llama):
    dense, packed = llama
    for dtype in (torch.float32, torch.float16):
        reference, model = load(dense).to(dtype), load(packed).to(dtype)
        assert {layer.weight.dtype for layer in sparse(model)} == {reference.dtype}
        assert {layer.packed.dtype for layer in sparse(model)} == {torch.uint8}
        assert_close(reference, model, 2**-6)
    with pytest.raises(ValueError, match="not supported for quantized"):
        load(packed).half()
    layer = sparse(load(packed))[0]
    x = torch.randn(3, layer.in_features)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # without a bias, x may have any dtype
        assert layer(x.to(dtype)).dtype == dtype


def test_on_meta_the_weight_has_its_shape(llama):
    model = load(llama[1])
    model.to("meta")
    layer = sparse(model)[0]
    assert layer.weight.is_meta
    assert layer.weight.shape == (layer.out_features, layer.in_features)


def test_gradients_reach_the_input_and_no_weight(llama):
    model = load(llama[1]).train()
    model.requires_grad_(True)
    assert not model.hf_quantizer.is_trainable
    layer = sparse(model)[0]
    assert not layer.weight.requires_grad
    assert not [name for name, _ in model.named_parameters() if name.endswith("_proj.weight")]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.float().sum(0).expand(3, -1), atol=1e-4)
    model(tiny.ids(1)).logits.float().sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_trainer_refuses_packed_weights(llama):
    from transformers import Trainer, TrainingArguments

    model = load(llama[1])
    with pytest.raises(ValueError, match="quantiz"):
        Trainer(model, TrainingArguments(report_to=[], use_cpu=True))


def test_counting(llama):
    dense, packed = llama
    reference, model = load(dense), load(packed)
    assert model.num_parameters() < reference.num_parameters()
    held = sum(layer.packed.numel() for layer in sparse(model))
    assert model.get_memory_footprint() >= held > 0
    assert "in_features=64" in repr(model)


def test_dequantize_gives_the_dense_model_back(llama):
    dense, packed = llama
    model = load(packed).dequantize()
    assert not sparse(model)
    assert_same_weights(load(dense), model)
    assert torch.equal(logits(load(dense)), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_saved_again_it_is_a_plain_dense_checkpoint(family, tmp_path):
    dense, packed = both(family, tmp_path)
    model = load(packed)
    assert sparse(model)
    for attempt in ("once", "again"):
        model.save_pretrained(tmp_path / attempt)
        config = json.loads((tmp_path / attempt / "config.json").read_text())
        assert not {"quantization_config", "transformers_weights"} & set(config)
        restored = load(tmp_path / attempt)
        assert not sparse(restored)
        assert_same_weights(load(dense), restored)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m, info = A.from_pretrained({str(tmp_path / 'again')!r}, dtype='auto', output_loading_info=True);"
        "assert 'sparsekit' not in sys.modules and not any(info.values()), info"
    )
    status, output = python(code)
    assert status == 0, output
    status, output = python(code.replace(str(tmp_path / "again"), str(packed)))
    assert status != 0
    assert "no file named model.safetensors" in output


def test_a_model_of_another_size_is_refused_before_anything_is_unpacked(llama, tmp_path):
    _, packed = converted("llama", tmp_path)
    path = packed / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 32}))
    with pytest.raises(SparsekitError, match=r"layers\.0\.mlp\.\w+_proj\.weight: shape .* the model's parameter needs"):
        load(packed)
