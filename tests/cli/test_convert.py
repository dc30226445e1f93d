"""`sparsekit convert` between all forms, every bit compared, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparsekit import convert as module
from sparsekit.checkpoint.manifest import read_manifest
from sparsekit.checkpoint.safetensors_file import read_header
from sparsekit.cli.app import build
from sparsekit.convert import convert
from sparsekit.errors import SparsekitError
from sparsekit.pack.files import PackedFile
from sparsekit.pack.verify import verify
from sparsekit.progress import Silent
from tests.pack.test_compressed_tensors import written
from tests.runtime.support import assert_same, both, load, prune
from tests.support import tiny

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def _unpacked(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "dense")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return both("llama", tmp_path_factory.mktemp("llama"), form="auto", **WIDE)


def command(*arguments):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(build(), [str(argument) for argument in arguments])
    return result.exit_code, result.stdout + result.stderr


def bits(folder):
    """Return every dense tensor as integers."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        opened = PackedFile(file)
        for name in opened.names():
            tensor = opened.dense(name)
            found[name] = tensor.contiguous().view(kinds[tensor.element_size()])
    return found


def assert_equal(left, right):
    a, b = bits(left), bits(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def forms(folder):
    entries = [entry for file in sorted(folder.glob("*.safetensors")) for entry in PackedFile(file).facts.values()]
    return {f"{entry['layout']}/{entry['encoding']}" for entry in entries}


# --- between sparsekit's own forms -------------------------------------------------------------------------
@pytest.mark.parametrize("values", ["auto", "raw", "split"])
@pytest.mark.parametrize("start", [0, 1], ids=["dense", "packed"])
def test_there_and_back(llama, start, values, tmp_path):
    code, output = command("convert", llama[start], "--to", "bitmask", "--values", values, "-o", tmp_path / "packed")
    assert code == 0, output
    if values != "auto":
        assert forms(tmp_path / "packed") == {f"bitmask/{values}"}
    code, output = command("convert", tmp_path / "packed", "--to", "dense", "-o", tmp_path / "dense")
    assert code == 0, output
    for folder in ("packed", "dense"):
        assert_equal(tmp_path / folder, llama[0])
        assert verify(tmp_path / folder, "semantic").problems == ()
    manifest, original = read_manifest(tmp_path / "dense"), read_manifest(llama[start])
    assert manifest.tensors == read_manifest(llama[0]).tensors
    assert manifest.raw["base"] == original.raw["base"]
    assert manifest.identity["recipe"] == original.identity["recipe"]
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == json.loads(
        (llama[0] / "config.json").read_text()
    )
    for name in ("README.md", "recipe.yaml", "tokenizer.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (llama[start] / name).read_bytes()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_a_run_and_a_conversion_pack_alike(family, tmp_path):
    dense, packed = both(family, tmp_path)
    out = convert(dense, "bitmask", tmp_path / "converted", Silent()).out
    assert_equal(out, packed)
    packed_facts, facts = read_manifest(packed).raw["packed"], read_manifest(out).raw["packed"]
    assert packed_facts == facts
    assert_same(load(out), load(dense))


def test_two_of_four_as_indices_and_back(tmp_path):
    source = tiny.save("gpt2", tmp_path / "source", dtype=torch.bfloat16)
    dense = prune(source, tmp_path / "dense", "dense", "wanda-2of4")
    packed = convert(dense, "nm", tmp_path / "nm", Silent()).out
    assert forms(packed) == {"nm/raw"}
    assert_equal(convert(packed, "dense", tmp_path / "back", Silent()).out, dense)
    assert verify(packed, "semantic").problems == ()


def test_kept_zeros_and_negative_zeros_survive(tmp_path):
    source = tiny.save("llama", tmp_path / "source", dtype=torch.bfloat16, **WIDE)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][:, :50] = 0.0  # more zeros than are removed: some zeros are kept
    tensors[name][3, :60] = -0.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    dense = prune(source, tmp_path / "dense", "dense", "magnitude-50")
    packed = convert(dense, "bitmask", tmp_path / "packed", Silent()).out
    assert read_manifest(packed).raw["packed"][name]["nnz"] == read_manifest(dense).tensors[name].kept
    assert_equal(packed, dense)
    assert_equal(convert(packed, "dense", tmp_path / "back", Silent()).out, dense)


def test_int8_loses_bits_only_when_asked(llama, tmp_path):
    out = convert(llama[0], "bitmask", tmp_path / "int8", Silent(), values="int8").out
    facts = read_manifest(out).raw["packed"]
    assert all(0 < entry["error"] < 1e-3 for entry in facts.values())
    assert verify(out, "semantic").problems == ()


def test_a_killed_conversion_goes_on(llama, tmp_path, monkeypatch):
    whole = convert(llama[0], "auto", tmp_path / "whole", Silent()).out
    original, seen = module._convert_shard, []

    def stop_at_third(*arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_convert_shard", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            convert(llama[0], "auto", tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()
    calls = []
    monkeypatch.setattr(module, "_convert_shard", lambda *given: calls.append(1) or original(*given))
    done = convert(llama[0], "auto", tmp_path / "out", Silent())
    assert len(calls) == 2
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (done.out / path.name).read_bytes()
    assert convert(llama[0], "auto", tmp_path / "out", Silent()).already_finished


# --- folders of others -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "transposed"), [("llama", False), ("gpt2", True)])
def test_a_plain_pruned_folder(family, transposed, tmp_path):
    plain = tiny.save(family, tmp_path / "plain", dtype=torch.bfloat16)
    model = load(plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and (".layers." in name or ".h." in name):
                parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    model.save_pretrained(plain)
    packed = convert(plain, "bitmask", tmp_path / "packed", Silent(), values="raw").out
    facts = read_manifest(packed).raw["packed"]
    assert facts
    assert {entry["transposed"] for entry in facts.values()} == {transposed}
    assert_equal(packed, plain)
    assert_same(load(packed), model.eval())
    assert_equal(convert(packed, "dense", tmp_path / "back", Silent()).out, plain)


def test_a_plain_folder_in_two_of_four_is_recognised(llama, tmp_path):
    source = tiny.save("llama", tmp_path / "source", dtype=torch.bfloat16)
    dense = prune(source, tmp_path / "dense", "dense", "wanda-2of4")
    (dense / "sparsekit.json").unlink()
    assert forms(convert(dense, "nm", tmp_path / "nm", Silent()).out) == {"nm/raw"}


def old_folder(dense: Path, folder: Path, kind: str) -> Path:
    """Write a dense pruned folder as compressed-tensors 0.11 did."""
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*", "sparsekit.json"))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(dense.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "_proj" in name:
                parts = written(tensor, tensor != 0, kind)
                tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
            else:
                tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_quantization(folder, {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
                              "sparsity_config": {"format": kind, "targets": ["Linear"]}})  # fmt: skip
    return folder


def set_quantization(folder: Path, entry: dict) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": entry}))


@pytest.mark.parametrize(
    ("kind", "recipe", "to"),
    [
        ("sparse-bitmask", "magnitude-50", "dense"),
        ("sparse-bitmask", "magnitude-50", "auto"),
        ("sparse-24-bitmask", "wanda-2of4", "dense"),
        ("sparse-24-bitmask", "wanda-2of4", "nm"),
    ],
)
def test_old_compressed_tensors_folders(kind, recipe, to, tmp_path):
    source = tiny.save("llama", tmp_path / "source", dtype=torch.bfloat16)
    dense = prune(source, tmp_path / "dense", "dense", recipe)
    old = old_folder(dense, tmp_path / "old", kind)
    out = convert(old, to, tmp_path / "out", Silent()).out
    assert_equal(out, dense)
    assert_same(load(out), load(dense))
    assert verify(out, "semantic").problems == ()


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24 weights cannot be read"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "a.py"}}, "unknown sparse format 'a.py'"),
        ({"quant_method": "gptq"}, "the checkpoint is quantised (gptq)"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}, "holds no bitmask"),
    ],
)
def test_what_cannot_be_converted(entry, text, llama, tmp_path):
    folder = Path(shutil.copytree(llama[0], tmp_path / "folder"))
    (folder / "sparsekit.json").unlink()
    set_quantization(folder, entry)
    code, output = command("convert", folder, "--to", "dense", "-o", tmp_path / "out")
    assert code == 3
    assert text in " ".join(output.split())
    assert not (tmp_path / "out").exists()


# --- refusals ----------------------------------------------------------------------------------------------
def test_options_that_do_not_go_together(llama, tmp_path):
    for more, text in [
        (["--to", "dense", "--values", "raw"], "--to is dense"),
        (["--to", "nm"], "does not exist for"),
        (["--to", "block"], "does not exist for"),
    ]:
        code, output = command("convert", llama[0], *more, "-o", tmp_path / "out")
        assert code == 2, output
        assert text in " ".join(output.split())
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert command("convert", llama[0], "--to", "auto", "-o", tmp_path / "out")[0] == 2
    assert (tmp_path / "out" / "mine.txt").exists()
    assert command("convert", llama[0], "--to", "auto", "-o", tmp_path / "out", "--overwrite")[0] == 0
    for place in (llama[0], llama[0] / "inside", llama[0].parent):
        assert command("convert", llama[0], "--to", "auto", "-o", place, "--overwrite")[0] == 2


def test_nothing_to_pack(tmp_path):
    plain = tiny.save("llama", tmp_path / "plain", dtype=torch.bfloat16)
    code, output = command("convert", plain, "--to", "auto", "-o", tmp_path / "out")
    assert code == 3
    assert "nothing can be packed" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_a_damaged_source_is_not_converted(llama, tmp_path):
    folder = Path(shutil.copytree(llama[1], tmp_path / "folder"))
    path = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SparsekitError, match=path.name):
        convert(folder, "dense", tmp_path / "out", Silent())


def test_a_dense_source_that_was_trained_again(llama, tmp_path):
    folder = Path(shutil.copytree(llama[0], tmp_path / "folder"))
    path = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "up_proj" in name)
    tensors[name] += 1
    save_file(tensors, path, dict(read_header(path).metadata))
    with pytest.raises(SparsekitError, match="is not the file that the manifest recorded"):
        convert(folder, "auto", tmp_path / "out", Silent())


# --- other commands on packed folders ----------------------------------------------------------------------
def test_inspect_counts_the_zeros_of_packed_tensors(llama):
    documents = []
    for folder in llama:
        done = CliRunner().invoke(build(), ["inspect", str(folder), "--json", "-q"])
        documents.append(json.loads(done.stdout))
    dense, packed = documents
    assert packed["parameters"] == dense["parameters"]
    assert packed["total_bytes"] < dense["total_bytes"]
    for left, right in zip(dense["kinds"], packed["kinds"], strict=True):
        same = ("name", "count", "shapes", "numel", "zeros", "kept", "sparsity")
        assert [left[key] for key in same] == [right[key] for key in same]
        assert right["forms"] == ["bitmask/split"]
        assert right["bits_per_weight"] < 9 < left["bits_per_weight"] == 16
    assert packed["agreement"]["ok"]
    code, output = command("inspect", llama[1], "-q")
    assert code == 0
    assert "bitmask/split" in output
    assert command("inspect", llama[1], "--no-weights", "-q")[0] == 0


def test_pruning_a_packed_folder_is_refused(llama, tmp_path):
    code, output = command("prune", llama[1], "--recipe", "magnitude-50", "-o", tmp_path / "out", "--no-evaluate")
    assert code == 3
    assert "sparsekit convert FOLDER --to dense" in " ".join(output.split())
