"""Bad input to the finished commands: one line that says what, where and what to do; nothing lost or half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekit import plan
from sparsekit.errors import OutOfMemory
from tests.support import tiny

from .command import (
    SMALL,
    check_refusal,
    command,
    content,
    identity,
    invoke,
    leftovers,
    prune_arguments,
    settings,
)

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
MEASURE = ["--samples", 2, "--sequence-length", 32]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("source") / "llama", dtype=torch.float32)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))


def refuse(
    model: Any, tmp_path: Path, code: int, *says: str, more: Any = (), keeps: bool = False, **options: Any
) -> None:
    """`prune` refuses; the model is as it was and nothing stands where OUT would be."""
    source = Path(model)
    before = content(source) if source.is_dir() else {}
    out = tmp_path / "out"
    check_refusal(invoke(*prune_arguments(model, out, *more, **options)), code, *says)
    assert not out.exists()
    assert keeps or leftovers(out) == []
    assert not before or content(source) == before


def configure(model: Path, **changes: Any) -> Path:
    file = model / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return model


def weigh(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / WEIGHTS, {"format": "pt"})
    return model


def shard(model: Path) -> Path:
    """Split the weights into two files with an index."""
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({name: tensors[name] for name in keys}, model / file, {"format": "pt"})
    weight_map = {name: file for file, keys in parts.items() for name in keys}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / WEIGHTS).unlink()
    return model


# --- recipes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (["stages.0.method=wnada"], 2, ["--set stages.0.method", "Unknown pruner 'wnada'", "Did you mean 'wanda'?"]),
        (["stages.0.sparsity=1.7"], 2, ["--set stages.0.sparsity", "from 0 to 1", "got 1.7"]),
        (["stages.0.sparsity=-0.1"], 2, ["from 0 to 1", "got -0.1"]),
        (["stages.0.sparsity=half"], 2, ["from 0 to 1", "got 'half'"]),
        (["stages.0.sparsity=.nan"], 2, ["--set stages.0.sparsity", "not a finite number"]),
        (["stages.0.sparsty=0.5"], 2, ["unknown key 'sparsty'", "did you mean 'sparsity'?"]),
        (["stages.0.pattern=2:5", "stages.0.sparsity=0.6"], 2, ["q_proj", "divisible by 5, got 32", "ignore"]),
        (["stages.0.pattern=7x3"], 2, ["q_proj", "7x3", "32 x 32", "Choose another block size"]),
        (["stages.0.pattern=sometimes"], 2, ["pattern", "'sometimes'"]),
        (["stages.0.targets=['*.nope']"], 2, ["stages.0.targets.0", "'*.nope' matches no linear", "Names look like"]),
        (["stages.0.ignore=['*.nope']"], 2, ["stages.0.ignore.0", "'*.nope' matches no linear"]),
        (["stages.0.ignore=['*']"], 2, ["no linear is left to prune", "Check targets and ignore."]),
        (["stages.0.targets=['re:(']"], 2, ["'re:(' is not a regular expression"]),
        (["stages.0.targets=['*.q_proj']"], 3, ["covers 13.3%", "asks for 90%", "mlp.down_proj (3)", "min_coverage"]),
        (["stages.0.allocate=owel"], 2, ["Unknown allocator 'owel'", "Did you mean 'owl'?", "uniform"]),
        (["calibration.samples=0"], 2, ["--set calibration.samples", "at least 1, got 0"]),
        (["calibration.seed=-1"], 2, ["--set calibration.seed", "at least 0, got -1"]),
        (["calibration.sequence_length=65"], 2, ["65", "model's maximum 64", "Set it to 64 or less."]),
        (["stages=[]"], 2, ["--set stages", "at least one entry"]),
        (["stages.5.sparsity=1"], 2, ["stages has no entry '5'"]),
        (["name=../evil"], 2, ["--set name", "'../evil'"]),
        (["nonsense"], 2, ["--set needs KEY=VALUE, got 'nonsense'", "For example"]),
        (["=3"], 2, ["--set needs KEY=VALUE"]),
        (["colour=red"], 2, ["unknown key 'colour'"]),
        (["extends=smoke"], 2, ["extends cannot be overridden", "Write a recipe file."]),
        (["gates.max_kl=0.1"], 2, ["--no-evaluate", "gates unchecked", "Leave --no-evaluate out"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and "=" in str(value[0]) else None,
)
def test_recipe_values(changes: list[str], code: int, says: list[str], llama: Path, tmp_path: Path) -> None:
    refuse(llama, tmp_path, code, *says, more=settings(*changes), recipe="wanda-50")


def test_recipe_files_name_line_and_column(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "r.yaml"
    file.parent.mkdir()
    head = "sparsekit: 1\nname: r\ndescription: d\n"
    for body, says in (
        ("stages:\n  - {stage: prune, method: wanda, sparsty: 0.5}\n", ["r.yaml:5:35", "unknown key 'sparsty'"]),
        ("stages:\n  - {stage: prune, method: wanda}\n", ["r.yaml:5:5", "sparsity"]),
        ("stages: [\n", ["r.yaml:5:1"]),
        ("extends: ../configs/calibration/builtin.yaml\n", ["r.yaml:4:10", "leaves the folder"]),
    ):
        file.write_text(head + body)
        refuse(llama, tmp_path, 2, *says, recipe=file)
    file.write_text(head + "stages:\n  - {stage: prune, method: magnitude, sparsity: 0.5}\n")
    assert invoke(*prune_arguments(llama, tmp_path / "out", recipe=file)).code == 0


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("wanda50", ["Unknown recipe 'wanda50'", "Did you mean 'wanda-50'?"]),
        ("./absent.yaml", ["./absent.yaml", "No such file"]),
        ("/dev/null", ["/dev/null", "regular file"]),
    ],
)
def test_recipes_that_do_not_exist(recipe: str, says: list[str], llama: Path, tmp_path: Path) -> None:
    refuse(llama, tmp_path, 2, *says, recipe=recipe)


@pytest.mark.parametrize(("dtype", "code"), [("float8", 2), ("", 2), ("FP32", 2)])
def test_dtypes(dtype: str, code: int, llama: Path, tmp_path: Path) -> None:
    refuse(llama, tmp_path, code, "--dtype", "auto, bf16, fp16, fp32", more=["--dtype", dtype])


# --- finding and reading the model -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere/at all", ["/nowhere/at all does not exist", "config.json"]),
        ("acme/nope", ["'acme/nope'", "neither a local folder nor in the cache", "Give a local folder"]),
        ("nope", ["'nope'", "Give a local folder"]),
        ("a/b/c", ["a/b/c does not exist"]),
        ("x.gguf", ["x.gguf does not exist"]),
        ("/dev/null", ["/dev/null"]),
    ],
)
def test_models_that_do_not_exist(name: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (prune_arguments(name, "out"), ["eval", name], ["inspect", name]):
        check_refusal(invoke(*arguments), 3, *says)
    assert sorted(tmp_path.iterdir()) == []


CONFIGS: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "missing": (lambda m: (m / "config.json").unlink(), 3, ["no config.json", "Need a Hugging Face model folder"]),
    "no JSON": (lambda m: (m / "config.json").write_text("{nope"), 3, ["config.json", "not readable as JSON", "again"]),
    "binary": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe\0"), 3, ["config.json", "not readable as JSON"]),
    "a list": (lambda m: (m / "config.json").write_text("[]"), 3, ["need a JSON object, got list"]),
    "deep": (lambda m: (m / "config.json").write_text("[" * 100_000), 3, ["config.json", "not readable as JSON"]),
    "unknown type": (lambda m: configure(m, model_type="nonesuch"), 3, ["'nonesuch'", "transformers", "update"]),
    "no type": (lambda m: configure(m, model_type=None), 3, ["no model_type"]),
    "encoder-decoder": (lambda m: configure(m, model_type="t5"), 3, ["t5 is an encoder-decoder model", "causal"]),
    "vision": (lambda m: configure(m, model_type="vit"), 3, ["no causal language model", "config.json"]),
    "other family": (lambda m: configure(m, model_type="gpt2"), 3, ["no tensor for", "another model"]),
    "quantised": (lambda m: configure(m, quantization_config={"quant_method": "x"}), 3, ["quantised (x)", "bf16"]),
    "quantised list": (lambda m: configure(m, quantization_config=["gptq"]), 3, ["quantised"]),
    "size is text": (lambda m: configure(m, hidden_size="32"), 3, ["hidden_size", "expected int, got str"]),
    "negative size": (lambda m: configure(m, hidden_size=-4), 3, ["config.json", "negative"]),
    "odd heads": (lambda m: configure(m, num_attention_heads=5), 3, ["multiple of the number of attention heads"]),
    "other width": (lambda m: configure(m, intermediate_size=64), 3, ["down_proj", "[32, 48]", "[32, 64]", "fetch"]),
    "other vocabulary": (lambda m: configure(m, vocab_size=200), 3, ["[96, 32]", "[200, 32]"]),
    "more blocks": (lambda m: configure(m, num_hidden_layers=4), 3, ["model.layers.3.", "and 8 more", "incomplete"]),
    "no blocks": (lambda m: configure(m, num_hidden_layers=0), 3, ["no stack of decoder blocks"]),
    "odd activation": (lambda m: configure(m, hidden_act="nonesuch"), 3, ["config.json", "nonesuch"]),
    "odd rope": (lambda m: configure(m, rope_parameters={"rope_type": "nonesuch"}), 3, ["config.json", "nonesuch"]),
    "odd dtype": (lambda m: configure(m, dtype="float99"), 3, ["config.json", "float99"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, model: Path, tmp_path: Path) -> None:
    damage, code, says = CONFIGS[case]
    damage(model)
    refuse(model, tmp_path, code, *says)


def _rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda m: (m / WEIGHTS).write_bytes(change((m / WEIGHTS).read_bytes()))


def _only(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda m: ((m / WEIGHTS).unlink(), (m / name).write_bytes(data))


FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no weights": (lambda m: (m / WEIGHTS).unlink(), ["no model.safetensors", "whole model"]),
    "cut off": (_rewrite(lambda data: data[:-100]), [WEIGHTS, "bytes on disk", "in the header", "Copy the file again"]),
    "cut in the header": (_rewrite(lambda data: data[:300]), ["300 bytes on disk", "for the header alone"]),
    "empty": (_rewrite(lambda data: b""), ["0 bytes on disk, at least 8 needed"]),
    "longer": (_rewrite(lambda data: data + b"x" * 8), ["bytes on disk", "in the header"]),
    "noise": (_rewrite(lambda data: b"\x07" * 5000), ["a header of", "fetch it again"]),
    "duplicate key": (
        _rewrite(lambda data: data.replace(b'"lm_head.weight"', b'"model.norm.weight"')[:8] + data.replace(
            b'"lm_head.weight":', b'"model.norm.weight":')[8:]),
        [WEIGHTS, "fetch it again"],
    ),
    "pickle": (_only("pytorch_model.bin", b"\x80\x04."), ["pickle", "runs code", "Convert it"]),
    "pickle renamed": (_rewrite(lambda data: b"\x80\x04\x95"), ["pickle under a safetensors name"]),
    "git-lfs pointer": (_rewrite(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "link outside": (
        lambda m: ((m / WEIGHTS).unlink(), (m / WEIGHTS).symlink_to("/etc/hostname")),
        ["a link that leads outside the folder"],
    ),
    "a missing shard": (lambda m: (shard(m) / "b.safetensors").unlink(), ["b.safetensors", "shard missing", "again"]),
    "index without end": (
        lambda m: (shard(m) / "model.safetensors.index.json").write_text("["), ["index.json", "not usable JSON"]
    ),
    "index climbs": (
        lambda m: (shard(m) / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {UP: "../../other.safetensors"}})
        ),
        ["'..'", "Do not use"],
    ),
    "no block tensor": (lambda m: weigh(m, lambda t: t.pop(UP)), [f"no tensor for {UP}", "incomplete"]),
    "no norm": (lambda m: weigh(m, lambda t: t.pop("model.norm.weight")), ["no tensor for model.norm.weight"]),
    "no head": (lambda m: weigh(m, lambda t: t.pop("lm_head.weight")), ["no tensor for lm_head.weight"]),
    "flat weight": (lambda m: weigh(m, lambda t: t.update({UP: t[UP].reshape(-1)})), [UP, "[1536]", "[48, 32]"]),
    "integers": (
        lambda m: weigh(m, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})), ["I8", "unquantised"]
    ),
    "one of integers": (lambda m: weigh(m, lambda t: t.update({UP: t[UP].to(torch.int8)})), [UP, "I8", "BF16"]),
    "float64": (lambda m: weigh(m, lambda t: t.update({k: v.double() for k, v in t.items()})), ["F64", "need BF16"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_weight_files(case: str, model: Path, tmp_path: Path) -> None:
    damage, says = FILES[case]
    damage(model)
    refuse(model, tmp_path, 3, *says)
    refuse(model, tmp_path, 3, *says, recipe="wanda-50", evaluate=True)


@pytest.mark.parametrize("recipe", ["wanda-50", "magnitude-50"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP, "model.layers.1.input_layernorm.weight"])
def test_weights_that_are_no_numbers(recipe: str, value: float, name: str, model: Path, tmp_path: Path) -> None:
    weigh(model, lambda t: t[name].view(-1).__setitem__(5, value))
    kind = "NaN" if value != value else "infinite"
    says = [f"{name}: 1 of ", f"weights are {kind} (first at [", "5])", "Fetch the model again"]
    refuse(model, tmp_path, 4, *says, recipe=recipe, keeps=True)


def test_activations_that_are_no_numbers(model: Path, tmp_path: Path) -> None:
    """Named by layer, sample and token."""
    weigh(model, lambda t: t["model.embed_tokens.weight"][4:].fill_(float("nan")))
    refuse(model, tmp_path, 4, "embeddings: ", "NaN (sample 0, first at token 0)", recipe="wanda-50")
    weigh(model, lambda t: t["model.embed_tokens.weight"].fill_(0.1))
    weigh(model, lambda t: t["model.layers.1.mlp.gate_proj.weight"].fill_(3e38))
    says = ["model.layers.1.mlp.down_proj: ", "activation rows", "(sample 0, first at token 0)", "calibration source"]
    refuse(model, tmp_path, 4, *says, recipe="wanda-50", keeps=True)
    weigh(model, lambda t: t["model.layers.1.mlp.gate_proj.weight"].fill_(0.1))
    weigh(model, lambda t: t["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    more = ["--no-resume"]
    refuse(model, tmp_path, 4, "down_proj", "scores are not finite", "check", recipe="wanda-50", keeps=True, more=more)


def test_float16_overflows(model: Path, llama: Path, tmp_path: Path) -> None:
    half = ["--dtype", "fp16"]
    weigh(model, lambda t: t["model.layers.0.mlp.down_proj.weight"].mul_(6e4))
    refuse(model, tmp_path, 4, "model.layers.0", "infinite", "--dtype", more=half, recipe="wanda-50", keeps=True)
    weigh(model, lambda t: t.update({**load_file(llama / WEIGHTS), "lm_head.weight": t["lm_head.weight"] * 1e6}))
    says = ["lm_head.weight", "overflow float16", "--dtype bf16"]
    refuse(model, tmp_path, 4, *says, more=[*half, "--no-resume"], keeps=True)


def test_weights_that_are_strange_but_fine(model: Path, tmp_path: Path) -> None:
    """Rows of zeros, other dtypes beside each other, tensors without a place, several files, tied heads."""
    out = tmp_path / "out"

    def change(t: dict[str, torch.Tensor]) -> None:
        t[UP].zero_()
        t["model.norm.weight"] = t["model.norm.weight"].bfloat16()
        t["extra.thing"] = torch.arange(10)
        t["model.layers.1.odd"] = torch.ones(3)

    before = load_file(weigh(model, change) / WEIGHTS)
    ended = invoke(*prune_arguments(shard(model), out, recipe="wanda-50", evaluate=True))
    assert ended.code == 0, ended.err
    assert "2 tensors have no place in the model and are copied unchanged, first extra.thing" in ended.err
    after = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert after.keys() == before.keys()
    for name in ("extra.thing", "model.layers.1.odd", "model.norm.weight", "lm_head.weight"):
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    tied = tiny.save("llama", tmp_path / "tied", tie_word_embeddings=True, num_hidden_layers=1)
    assert "lm_head.weight" not in load_file(tied / WEIGHTS)
    assert invoke(*prune_arguments(tied, tmp_path / "one", recipe="wanda-50", evaluate=True)).code == 0
    assert invoke("verify", tmp_path / "one", "--level", "semantic").code == 0


def test_a_folder_with_spaces_and_unicode(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "sp ace ünï ☃.gguf"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ended = invoke("prune", folder, "-r", "magnitude-50", "--no-evaluate")
    assert ended.code == 0, ended.err
    assert [path.name for path in Path.cwd().iterdir()] == ["sp ace ünï ☃.gguf-magnitude-50"]
    assert invoke("inspect", Path.cwd() / "sp ace ünï ☃.gguf-magnitude-50").code == 0


# --- GGUF --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", ["not a GGUF file", "Download it again"]),
        (b"nope" * 100, ["not a GGUF file"]),
        (b"GGUF" + bytes(range(256)) * 10, ["transformers cannot read it", "damaged"]),
        (b"GGUF\x03\0\0\0" + bytes(16), ["transformers cannot read it", "general.architecture"]),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, ["transformers cannot read it"]),
    ],
)
def test_gguf_files(data: bytes, says: list[str], tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    refuse(file, tmp_path, 3, "m.gguf", *says)
    assert not list((tmp_path / "cache").glob("*"))


# --- code of the model, pickles ----------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_model_never_runs(file: str, model: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    (model / "evil.py").write_text(f"open({str(sentinel)!r}, 'w').write('ran')\nclass Evil: pass\n")
    settings_file = json.loads((model / file).read_text())
    kinds = ("AutoConfig", "AutoModelForCausalLM") if file == "config.json" else ("AutoTokenizer",)
    code: Any = "evil.Evil" if file == "config.json" else ["evil.Evil", "evil.Evil"]
    settings_file["auto_map"] = dict.fromkeys(kinds, code)
    (model / file).write_text(json.dumps(settings_file))
    for kind in ("llama", "mine"):
        configure(model, model_type=kind)
        says = [file, "auto_map", "--trust-remote-code"]
        refuse(model, tmp_path, 3, *says, recipe="wanda-50", evaluate=True)
        check_refusal(invoke("eval", model), 3, *says)
        check_refusal(invoke("inspect", model), 3, *says)
    assert not sentinel.exists()


def test_code_in_side_files_never_runs(model: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    evil = f"open({str(sentinel)!r}, 'w').write('ran')\nclass Evil: pass\ndef generate(model, **k): pass\n"
    (model / "evil.py").write_text(evil)
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(evil)
    mapping = {"auto_map": {"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}, "custom_generate": "."}
    for file in ("processor_config.json", "preprocessor_config.json", "generation_config.json"):
        (model / file).write_text(json.dumps(mapping))
    ended = invoke(*prune_arguments(model, tmp_path / "out", recipe="wanda-50", evaluate=True))
    assert ended.code == 0, ended.err
    assert not sentinel.exists()


# --- tokenizer and text ------------------------------------------------------------------------------------
def test_a_model_without_tokenizer(model: Path, tmp_path: Path) -> None:
    """Wanda and the evaluation need one; magnitude alone does not."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    says = ["tokenizer", "is not there", "beside the weights"]
    refuse(model, tmp_path, 3, *says, recipe="wanda-50")
    refuse(model, tmp_path, 3, *says, evaluate=True)
    check_refusal(invoke("eval", model), 3, *says)
    assert invoke(*prune_arguments(model, tmp_path / "out")).code == 0


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_damaged_tokenizers(file: str, text: str, model: Path, tmp_path: Path) -> None:
    (model / file).write_text(text)
    refuse(model, tmp_path, 3, file, recipe="wanda-50")


TEXTS: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": ("t.txt", b"", ["t.txt", "0 bytes", "Name a file with text"]),
    "blank": ("t.txt", b"\n \n\n", ["t.txt", "no text in it"]),
    "too short": ("t.txt", b"hello", ["5 tokens = 0 blocks of 32, need 3 blocks = 96 tokens", "more text"]),
    "short": ("t.txt", b"hello" * 15, ["75 tokens = 2 blocks", "calibration.samples=2", "sequence_length=25"]),
    "no UTF-8": ("t.txt", b"\xff\xfe\0\1" * 99, ["t.txt", "byte 0 is not UTF-8", "Convert"]),
    "torn line": ("t.jsonl", b'{"text": "x"}\n{bad', ["t.jsonl:2", "column 2"]),
    "other field": ("t.jsonl", b'{"txt": "x"}\n', ["t.jsonl:1", "no field 'text'", "txt", "Set field"]),
    "number": ("t.jsonl", b'{"text": 3}\n', ["t.jsonl:1", "holds int, need text"]),
    "deep lines": ("t.jsonl", b"[" * 100_000, ["t.jsonl:1", "nested too deeply"]),
    "deep": ("t.json", b"[" * 100_000, ["t.json", "nested too deeply"]),
    "no parquet": ("t.parquet", b"PAR1xx", ["t.parquet", "not a readable parquet file"]),
    "unknown kind": ("t.pdf", b"x", ["t.pdf", "'.pdf'", "Use one of"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_calibration_text(case: str, llama: Path, tmp_path: Path) -> None:
    name, data, says = TEXTS[case]
    (tmp_path / name).write_bytes(data)
    refuse(llama, tmp_path, 3, *says, more=settings(f"calibration.source={tmp_path / name}"), recipe="wanda-50")
    ended = invoke("eval", llama, "--text", tmp_path / name, "--samples", 3, "--sequence-length", 32)
    check_refusal(ended, 3, *[text for text in says if "calibration" not in text])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/nowhere.txt", ["/nowhere.txt", "no such file", "builtin"]),
        ("/nowhere/*.jsonl", ["no file matches", "builtin"]),
        ("/proc", ["is a folder, need a file"]),
        ("c4", ["allenai/c4", "Offline, use", "builtin"]),
        ("acme/texts", ["acme/texts", "Offline, use"]),
    ],
)
def test_sources_that_are_not_there(source: str, says: list[str], llama: Path, tmp_path: Path) -> None:
    refuse(llama, tmp_path, 3, *says, more=settings(f"calibration.source={source}"), recipe="wanda-50")


def test_a_tokenizer_with_more_tokens_than_the_model(model: Path, tmp_path: Path) -> None:
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["~"] = 5000
    file.write_text(json.dumps(tokenizer))
    text = tmp_path / "t.txt"
    text.write_text("abc ~ " * 400)
    says = ["t.txt", "token id 5,000", "vocabulary of 96", "tokenizer that belongs"]
    refuse(model, tmp_path, 3, *says, more=settings(f"calibration.source={text}"), recipe="wanda-50")
    check_refusal(invoke("eval", model, "--text", text, *MEASURE), 3, *says)


def test_constant_text_is_pruned_all_the_same(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a" * 500)
    more = settings(f"calibration.source={tmp_path / 't.txt'}")
    assert invoke(*prune_arguments(llama, tmp_path / "out", *more, recipe="wanda-50", evaluate=True)).code == 0


def test_evaluation_is_checked_before_the_work(llama: Path, tmp_path: Path) -> None:
    for changes, says in (
        (["evaluate.text=missing.txt"], ["missing.txt", "no such file"]),
        (["evaluate.tasks=[nope]"], ["Unknown task 'nope'", "lm_eval ls tasks"]),
    ):
        refuse(llama, tmp_path, 3, *says, more=settings(*changes), recipe="wanda-50", evaluate=True)


# --- OUT ---------------------------------------------------------------------------------------------------
def test_the_model_is_never_overwritten(model: Path, llama: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(model)
    for out, says in (
        (model, "holds the model"),
        (link, "holds the model"),
        (tmp_path, "holds the model"),
        (model / "..", "holds the model"),
        (Path("/"), "holds the model"),
        (model / "sub", "lies in the folder of the model"),
        (link / "sub" / "deep", "lies in the folder of the model"),
    ):
        for more in ([], ["--overwrite"], ["--overwrite", "--no-resume"]):
            check_refusal(invoke(*prune_arguments(model, out, *more)), 2, says, "Choose another output with -o.")
    linked = tmp_path / "linked"  # weights that another folder only points to
    linked.mkdir()
    for name in ("config.json", WEIGHTS):
        os.link(model / name, linked / name)
    check_refusal(invoke(*prune_arguments(linked, linked, "--overwrite")), 2, "holds the model")
    shutil.rmtree(linked)
    link.unlink()
    assert content(tmp_path) == before


def test_a_gguf_file_is_never_overwritten(tmp_path: Path) -> None:
    from sparsekit.models.source import ModelSource
    from sparsekit.run import _refuse_source

    file = tmp_path / "models" / "m.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    cache = tiny.save("llama", tmp_path / "cache" / "gguf-1")
    from sparsekit.models.source import open_model
    from sparsekit.progress import Silent

    opened = open_model(str(cache), Silent())
    source = ModelSource(**{**opened.__dict__, "name": str(file)})
    for out in (file.parent, tmp_path, cache, cache / "x"):
        with pytest.raises(Exception, match=r"the model that is to be pruned"):
            _refuse_source(source, out)
    _refuse_source(source, file.parent / "out")


def test_outputs_that_cannot_be(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for out, code, says in (
        (file, 2, ["file", "exists and is a file", "-o"]),
        (file / "below", 5, ["file"]),
        (loop, 2, ["loop", "-o"]),
        ("/dev/null", 2, ["/dev/null", "-o"]),
        ("/proc/out", 5, ["/proc/out", "bytes are free"]),
        (tmp_path / ("x" * 300), 5, ["name too long"]),
    ):
        check_refusal(invoke(*prune_arguments(llama, out)), code, *says)
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("precious")
    check_refusal(invoke(*prune_arguments(llama, full)), 2, "exists and is not empty", "--overwrite")
    assert file.read_text() == (full / "precious").read_text() == "precious"


def test_outputs_that_can_be(llama: Path, tmp_path: Path) -> None:
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "not yet" / "there")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "a/b/c", dangling, tmp_path / "empty"):
        assert invoke(*prune_arguments(llama, out)).code == 0
        assert invoke("verify", out, "--level", "semantic").code == 0
    assert dangling.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without rights")
def test_a_place_that_may_not_be_written(llama: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.seteuid(65534)
            ended = invoke(*prune_arguments(llama, closed / "out"))
            os.write(write, json.dumps([ended.code, ended.err]).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    code, err = json.loads(text)
    assert code == 5
    assert "permission denied" in err.lower()
    assert err.count("\n") == 1
    assert list(closed.iterdir()) == []


def test_after_a_refused_run_the_right_command_just_works(llama: Path, tmp_path: Path) -> None:
    """A run that failed before its first block must not make the corrected command a mismatch."""
    out = tmp_path / "out"
    (tmp_path / "t.txt").write_text("hello " * 400)
    broken = Path(shutil.copytree(llama, tmp_path / "model"))
    weigh(broken, lambda t: t["model.embed_tokens.weight"].fill_(float("nan")))
    check_refusal(invoke(*prune_arguments(broken, out, recipe="wanda-50")), 4)
    shutil.copy(llama / WEIGHTS, broken / WEIGHTS)
    more = settings(f"calibration.source={tmp_path / 't.txt'}")
    assert invoke(*prune_arguments(broken, out, *more, recipe="wanda-50")).code == 0
    assert leftovers(out) == ["out"]


# --- eval, verify, inspect ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--text", "none"], 3, ["nothing to evaluate", "Name a text or tasks."]),
        (["--text", "no.txt", *MEASURE], 3, ["no.txt", "no such file"]),
        (["--sequence-length", "65"], 3, ["65", "maximum 64", "64 or less"]),
        (["--tasks", "x", "--include-path", "/nowhere"], 3, ["/nowhere: no such folder", "--include-path"]),
        (["--baseline", "/nowhere", *MEASURE], 3, ["/nowhere does not exist"]),
        (["--dtype", "float8"], 2, ["--dtype float8"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) and str(value[0])[:2] == "--" else None,
)
def test_eval(arguments: list[Any], code: int, says: list[str], llama: Path) -> None:
    check_refusal(invoke("eval", llama, *arguments), code, *says)


def test_baselines_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "other", vocab_size=120)
    says = ["vocabulary has 96 tokens, the baseline's 120", "Compare with"]
    check_refusal(invoke("eval", llama, "--baseline", other, *MEASURE), 3, *says)
    configure(other, quantization_config={"quant_method": "awq"})
    check_refusal(invoke("eval", llama, "--baseline", other, *MEASURE), 3, "quantised (awq)")


def test_missed_gates(llama: Path, tmp_path: Path) -> None:
    both = ["eval", llama, "--baseline", llama, *MEASURE]
    for gate in (["--max-kl", "-1"], ["--max-perplexity-ratio", "0.5"], ["--max-perplexity-ratio", "nan"]):
        plain = invoke(*both, *gate, "-q")
        assert plain.code == 6
        assert "need at most" in plain.error
        assert "sequence length 32" in plain.error
        as_json = invoke(*both, *gate, "-q", "--json")
        assert as_json.code == 6
        assert len(json.loads(as_json.out)["missed_gates"]) == 1  # one document, not two
        assert as_json.error == plain.error
    unmeasured = invoke("eval", llama, *MEASURE, "--max-kl", "1", "-q")
    assert unmeasured.code == 6
    assert "was not measured" in unmeasured.error
    out = tmp_path / "out"
    more = [*settings("gates.max_kl=0"), "-q", "--json"]
    arguments = prune_arguments(llama, out, *more, recipe="wanda-50", evaluate=True)
    for _ in range(2):  # done, and found done
        pruned = invoke(*arguments)
        assert pruned.code == 6
        assert "The checkpoint was written all the same." in pruned.error
        assert len(json.loads(pruned.out)["missed_gates"]) == 1
    assert invoke("verify", out).code == 0


def test_logits_that_are_no_numbers(model: Path, tmp_path: Path) -> None:
    weigh(model, lambda t: t["lm_head.weight"].fill_(float("nan")))
    check_refusal(invoke("eval", model, *MEASURE), 4, "logits", "block 0, first at token 0")
    refuse(model, tmp_path, 4, "logits", recipe="wanda-50", evaluate=True, keeps=True)


def test_verify_and_inspect_of_what_is_none(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for place in (tmp_path / "nowhere", tmp_path, llama, file):
        check_refusal(invoke("verify", place), 3, "no sparsekit.json", str(place))
    for place in (tmp_path / "nowhere", tmp_path, file):
        check_refusal(invoke("inspect", place), 3, str(place))


def test_verify_finds_damage(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(*prune_arguments(llama, out)).code == 0
    shard_file = next(out.glob("model-00002*"))
    data = bytearray(shard_file.read_bytes())
    data[-1] ^= 1
    shard_file.write_bytes(data)
    damaged = invoke("verify", out)
    assert damaged.code == 3
    assert shard_file.name in damaged.out
    assert json.loads(invoke("verify", out, "--json").out)["ok"] is False
    assert "Copy the folder again" in damaged.out


# --- JSON --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["prune", "/nowhere", "-r", "smoke"], 3),
        (["prune", "MODEL", "-r", "nope"], 2),
        (["prune", "MODEL", "-r", "smoke", "--dtype", "x"], 2),
        (["eval", "/nowhere"], 3),
        (["eval", "MODEL", "--text", "none"], 3),
        (["verify", "/nowhere"], 3),
        (["inspect", "/nowhere"], 3),
        (["methods", "nope"], 2),
        (["recipes", "show", "nope"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_as_json(arguments: list[str], code: int, llama: Path) -> None:
    ended = invoke(*[str(llama) if word == "MODEL" else word for word in arguments], "--json")
    assert ended.code == code
    error = json.loads(ended.out)["error"]
    assert error["message"]
    assert "Traceback" not in ended.err


def test_results_as_json(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = settings(*SMALL)
    for arguments in (
        ["prune", llama, "-r", "wanda-50", "-o", out, *small, "--dry-run"],
        ["prune", llama, "-r", "wanda-50", "-o", out, *small],
        ["eval", out, "--baseline", llama, *MEASURE],
        ["verify", out],
        ["inspect", out],
    ):
        ended = invoke(*arguments, "--json")
        assert ended.code == 0, ended.err
        assert isinstance(json.loads(ended.out), dict)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prune"], "Missing argument 'MODEL'"),
        (["prune", "m"], "Missing option '--recipe'"),
        (["prune", "m", "-r", "smoke", "--seed", "-1"], "'--seed'"),
        (["eval", "m", "--limit", "0"], "'--limit'"),
        (["verify", "m", "--level", "deep"], "'deep' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors_are_one_line_too(arguments: list[str], says: str) -> None:
    check_refusal(command(*arguments), 2, says, f"See: sparsekit {arguments[0]} --help")


def test_usage_errors_as_json() -> None:
    ended = command("prune", "--json")
    assert ended.code == 2
    assert ended.err == ""
    assert json.loads(ended.out)["error"]["message"] == "Missing argument 'MODEL'."


# --- the machine -------------------------------------------------------------------------------------------
def test_a_poor_environment(llama: Path, tmp_path: Path) -> None:
    """No home, no place for temporary files, few descriptors, standard streams closed: it works all the same."""
    nowhere = {"HOME": "/proc/none", "TMPDIR": "/nowhere", "HF_HOME": "/proc/hf", "XDG_CACHE_HOME": "/proc/cache"}
    arguments = prune_arguments(llama, tmp_path / "out", "-q", recipe="wanda-50", evaluate=True)
    ended = command(*arguments, before="ulimit -n 24", env={**nowhere, "SPARSEKIT_CACHE": None})
    assert ended.code == 0, ended.err
    assert ended.err == ""
    arguments = prune_arguments(llama, tmp_path / "out", "-q", recipe="wanda-50")
    ended = command(*arguments, before="exec >&- 2>&-", env={"HOME": None})
    assert (ended.code, ended.out, ended.err) == (0, "", "")  # found done, said to nobody


def test_a_reader_that_goes_away(llama: Path, tmp_path: Path) -> None:
    arguments = prune_arguments(llama, tmp_path / "out", "--dry-run", "--json")
    ended = command(*arguments, before="exec > >(head -c 1)")
    assert ended.code in (0, 141)  # 0 where the pipe took all of it before the reader left
    assert ended.err == ""
    ended = command(*arguments, before="exec >/dev/full")
    check_refusal(ended, 5, "no space left")


def test_the_current_folder_is_gone(llama: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    ended = command("prune", llama, "-r", "magnitude-50", before=f"rmdir '{gone}'", cwd=gone)
    check_refusal(ended, 5, "the current folder no longer exists", "cd")


def test_too_little_memory(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = command(*prune_arguments(llama, tmp_path / "out"), before="ulimit -v 900000")
    check_refusal(ended, 5, "GiB", "ulimit -v")
    more = settings("calibration.samples=1000000000")
    says = ["the run needs about", "are free", "Lower calibration.samples"]
    refuse(llama, tmp_path, 5, *says, more=more, recipe="wanda-50")
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(OutOfMemory, match=r"needs about 1\.\d+ GB more memory, 1\.\d+ MB are free"):
        plan.require_memory((1 << 30) + plan._statm(1), "it", "Wait.")


def test_what_torch_raises_without_memory_is_understood() -> None:
    from sparsekit.cli.app import _expected

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert isinstance(_expected(caught.value), OutOfMemory)


def test_a_container_limits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan.available_memory_bytes()
    assert before is not None
    values = {"memory.max": 3 << 20, "memory.current": 2 << 20, "memory.stat": 1 << 19}
    monkeypatch.setattr(plan, "_cgroup", lambda name, field=None: values[name])
    assert plan.available_memory_bytes() == (1 << 20) + (1 << 19)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real disk of 512 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=512k sparsekit-test '{folder}' 2>/dev/null"):  # noqa: S605
        pytest.skip("mounting a small disk needs root")
    yield folder
    os.system(f"umount '{folder}'")  # noqa: S605


def test_a_full_disk(llama: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the work; found in the middle of it; and when there is room the same command goes on."""
    arguments = prune_arguments(llama, small_disk / "out", "-q", recipe="wanda-50")
    check_refusal(invoke(*arguments), 5, "the checkpoint needs", "bytes are free", "Free at least")
    assert list(small_disk.iterdir()) == []
    monkeypatch.setattr("sparsekit.fs.require_space", lambda *_: None)  # the space goes while it runs
    ballast = small_disk / "ballast"
    kept = []
    for room in (10_000, 60_000, 90_000, 110_000):
        ballast.write_bytes(bytes(512 * 1024 - 100_000 - room))
        ended = invoke(*arguments)
        check_refusal(ended, 5, "no space left", str(small_disk), "run the same command again")
        assert not (small_disk / "out").exists()
        kept.append(sum(file.stat().st_size for file in small_disk.rglob("model-*.safetensors")))
        assert kept == sorted(kept)
    ballast.unlink()
    assert invoke(*arguments).code == 0
    assert leftovers(small_disk / "out") == ["out"]
    assert invoke(*prune_arguments(llama, tmp_path / "other", "-q", recipe="wanda-50")).code == 0
    assert identity(small_disk / "out") == identity(tmp_path / "other")
