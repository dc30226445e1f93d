"""After `import sparsekit`, a packed checkpoint loads as exactly the model of the dense one."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from sparsekit.pack.files import PackedFile
from tests.runtime.support import assert_same, assert_same_weights, both, converted, load, prune
from tests.support import tiny

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def _unpacked(monkeypatch):
    """Everything here is about weights that are unpacked while they are loaded."""
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "dense")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return both("llama", tmp_path_factory.mktemp("llama"), form="auto", **WIDE)


def facts(folder):
    files = [PackedFile(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: entry for file in files for name, entry in file.facts.items()}


def python(code, **environment):
    """Run code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return done.returncode, done.stdout + done.stderr


# --- families ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_loads_exactly(family, tmp_path):
    dense, packed = converted(family, tmp_path)
    assert facts(packed)
    assert_same(load(dense), load(packed))


@pytest.mark.parametrize(
    ("family", "form"), [("gpt2", "auto"), ("mixtral", "bitmask"), ("qwen3_moe", "auto"), ("gpt_oss", "bitmask")]
)
def test_a_packed_run_loads_as_the_dense_run(family, form, tmp_path):
    dense, packed = both(family, tmp_path, form=form)
    assert_same(load(dense), load(packed))


@pytest.mark.parametrize(("family", "form"), [("llama", "nm"), ("gpt2", "nm"), ("mixtral", "nm"), ("llama", "bitmask")])
def test_two_of_four_loads_exactly(family, form, tmp_path):
    source = tiny.save(family, tmp_path / "source", dtype=torch.bfloat16)
    dense = prune(source, tmp_path / "dense", "dense", "wanda-2of4")
    packed = prune(source, tmp_path / "packed", form, "wanda-2of4")
    assert {entry["layout"] for entry in facts(packed).values()} == {form}
    assert_same(load(dense), load(packed))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied, tmp_path):
    dense, packed = both("llama", tmp_path, tie_word_embeddings=tied)
    model = load(packed)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert_same(load(dense), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_stored_dtypes(dtype, tmp_path):
    dense, packed = both("llama", tmp_path, dtype=dtype)
    model = load(packed)
    assert model.dtype == dtype
    assert_same(load(dense), model)


# --- ways of loading ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"device_map": "auto"}], ids=str
)
def test_options_of_from_pretrained(llama, options):
    dense, packed = llama
    assert_same(load(dense, **options), load(packed, **options))


def test_packed_shards_are_several(llama):
    assert len(list(llama[1].glob("*.safetensors"))) == 4


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_on_disk(family, tmp_path):
    dense, packed = both(family, tmp_path)
    x = tiny.ids(2)
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{number}": "cpu" if number == 0 else "disk" for number in range(3)}
    model = load(packed, device_map=where, offload_folder=str(tmp_path / "offload"))
    with torch.no_grad():
        assert torch.equal(model(x).logits, load(dense)(x).logits)


def test_two_loads_in_one_process(llama):
    dense, packed = llama
    first, second = load(packed), load(packed)
    assert_same(first, second)
    assert_same(load(dense), second)


def test_the_base_model_alone(llama):
    dense, packed = llama
    left, right = (AutoModel.from_pretrained(folder, dtype="auto") for folder in (dense, packed))
    assert_same_weights(left, right)


def test_nothing_of_the_packing_is_left_in_the_model(llama):
    model = load(llama[1])
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config, "transformers_weights")
    assert not model.is_quantized


# --- using what was loaded ---------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True}], ids=str)
def test_generate(llama, options):
    texts = []
    for folder in llama:
        torch.manual_seed(0)
        texts.append(load(folder).generate(tiny.ids(2), max_new_tokens=8, **options))
    assert torch.equal(*texts)


def test_pipeline(llama):
    texts = []
    for folder in llama:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        write = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
        texts.append(write("abc", max_new_tokens=8, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]


def test_eval_measures_the_same(llama):
    from typer.testing import CliRunner

    from sparsekit.cli.app import build

    dense, packed = llama
    arguments = ["eval", str(packed), "--baseline", str(dense), "--samples", "2", "--sequence-length", "32", "--json"]
    done = CliRunner().invoke(build(), arguments)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    perplexities = [float(found) for found in numbers(document, "perplexity")]
    assert len(perplexities) >= 2
    assert len(set(perplexities)) == 1


def numbers(value, key):
    """Yield every number called `key`, however deep."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, int | float):
                yield inner
            yield from numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, key)


def test_lm_eval_model(llama):
    hf = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, ("ab c", " def"), number) for number in range(2)]
    scores = [
        hf.HFLM(pretrained=str(folder), device="cpu", dtype="auto", batch_size=1).loglikelihood(
            requests, disable_tqdm=True
        )
        for folder in llama
    ]
    assert scores[0] == scores[1]


def test_deepcopy_and_state_dict(llama):
    model = load(llama[1])
    assert_same(model, copy.deepcopy(model))
    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
    other.load_state_dict(model.state_dict())
    assert_same(model, other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_saved_again_it_is_a_plain_dense_checkpoint(family, tmp_path):
    dense, packed = both(family, tmp_path)
    model = load(packed)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "transformers_weights" not in config
    assert_same(load(dense), load(tmp_path / "again"))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m, info = A.from_pretrained({str(tmp_path / 'again')!r}, dtype='auto', output_loading_info=True);"
        "assert 'sparsekit' not in sys.modules and not any(info.values()), info;"
        "print('\\nsum', m(torch.arange(4, 20)[None]).logits.float().sum().item())"
    )
    status, output = python(code)
    assert status == 0, output
    found = re.search(r"^sum (\S+)$", output, re.MULTILINE)  # progress bars may stand around it
    assert found, output
    with torch.no_grad():
        assert float(found[1]) == model(torch.arange(4, 20)[None]).logits.float().sum().item()


# --- with and without sparsekit ----------------------------------------------------------------------------
def test_without_sparsekit_loading_fails_loudly(llama):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(llama[1])!r})"
    status, output = python(code)
    assert status != 0
    assert "sparsekit" in output or "no file named model.safetensors" in output


@pytest.mark.parametrize(
    "imports",
    [
        "import sparsekit, transformers",
        "import transformers, sparsekit",
        "import transformers.quantizers.auto, sparsekit",
    ],
)
def test_the_order_of_imports_does_not_matter(llama, imports):
    code = (
        f"{imports}\nm, info = transformers.AutoModelForCausalLM.from_pretrained({str(llama[1])!r}, "
        "dtype='auto', output_loading_info=True)\nassert not any(info.values()), info\n"
        "print('sum', sum(float(p.double().abs().sum()) for p in m.state_dict().values()))"
    )
    status, output = python(code)
    assert status == 0, output
    expected = sum(float(p.double().abs().sum()) for p in load(llama[0]).state_dict().values())
    found = re.search(r"sum (\S+)", output)  # a progress bar may end after it
    assert found, output
    assert float(found[1]) == pytest.approx(expected, rel=1e-12)
