"""`sparsekit inspect` and `sparsekit verify` on tiny models and on checkpoints that the test pruned itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparsekit import inspect_model as module
from sparsekit import run
from sparsekit.checkpoint.safetensors_file import read_header
from sparsekit.cli.app import build
from sparsekit.inspect_model import inspect_model
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from tests.support import tiny

SMALL = ["calibration.source=builtin", "calibration.samples=3", "calibration.sequence_length=32", "save.format=dense"]


def command(*arguments):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(build(), [str(argument) for argument in arguments])
    return result.exit_code, result.stdout


def document(*arguments):
    code, stdout = command(*arguments, "--json")
    return code, json.loads(stdout)


def prune(source, out, recipe="wanda-50"):
    prepared = prepare(load_recipe(recipe, SMALL), open_model(str(source), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=False).out


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return prune(tiny.save("llama", folder / "dense", dtype=torch.bfloat16), folder / "pruned")


@pytest.fixture
def pruned(pristine, tmp_path):
    """A copy that the test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "pruned"))


# --- inspect: structure and zeros --------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "falcon", "mixtral", "qwen2_moe", "gpt_oss"])
def test_zeros_per_kind_are_those_of_the_loaded_linears(family, tmp_path):
    model = tiny.build(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for position, parameter in enumerate(p for p in model.parameters() if p.ndim > 1):
            dropped = torch.rand(parameter.shape, generator=generator) < 0.1 + 0.02 * position
            parameter[dropped] = -0.0 if position % 2 else 0.0
    model.save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path), Silent())

    lazy = open_model(str(tmp_path), Silent()).lazy()
    expected = {}
    for index in range(lazy.blocks):
        lazy.load_block(index)
        for linear in lazy.stack.linears(index):
            kind = linear.name.removeprefix(f"{lazy.stack.prefix(index)}.")
            if linear.expert is not None:
                kind = kind.replace(f".{linear.expert}.", ".*.")
            count, zeros = expected.get(kind, (0, 0))
            expected[kind] = (count + 1, zeros + int((linear.weight() == 0).sum()))
    assert {kind.name: (kind.count, kind.zeros) for kind in found.kinds} == expected
    assert min(kind.zeros for kind in found.kinds) > 0
    assert sum(kind.numel for kind in found.kinds) == found.block_weights
    assert found.blocks == lazy.blocks
    assert found.agreement is None


def test_shapes_are_outputs_by_inputs_even_where_stored_the_other_way(tmp_path):
    tiny.save("gpt2", tmp_path, tokenizer=False)
    code, stdout = command("inspect", tmp_path)
    assert code == 0
    assert "GPT2LMHeadModel (gpt2)" in stdout
    row = next(line for line in stdout.splitlines() if line.startswith("attn.c_attn"))
    assert row.split() == ["attn.c_attn", "3", "96", "x", "32", "9.22", "k", "0.0000"]
    assert all(len(line) <= 80 for line in stdout.splitlines())


@pytest.mark.parametrize("chunk_bytes", [8, 1 << 10, 1 << 24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int8", "float8_e4m3fn"])
def test_counting_does_not_depend_on_the_pieces(dtype, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.0, 4.0, 1.0] * 37).to(getattr(torch, dtype))
    save_file({"other": torch.ones(5, 3), "x": values}, tmp_path / "a.safetensors")
    entry = read_header(tmp_path / "a.safetensors").tensors["x"]
    assert module.tally(tmp_path / "a.safetensors", entry, where="x") == module.Tally(4 * 37, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e5m2"])
def test_nan_and_infinity_are_told(dtype, tmp_path):
    values = torch.tensor([0.0, float("nan"), 1.0, float("inf"), -float("inf"), 50000.0]).to(getattr(torch, dtype))
    save_file({"x": values}, tmp_path / "a.safetensors")
    entry = read_header(tmp_path / "a.safetensors").tensors["x"]
    assert module.tally(tmp_path / "a.safetensors", entry, where="x") == module.Tally(5, 3)


def test_damaged_weights_are_named(tmp_path):
    model = tiny.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    _, stdout = command("inspect", tmp_path)
    assert "1 tensors hold NaN or infinity, first model.layers.1.mlp.up_proj.weight (1)" in " ".join(stdout.split())
    assert document("inspect", tmp_path)[1]["nonfinite"] == {"model.layers.1.mlp.up_proj.weight": 1}


def test_no_weights_reads_no_weights(pruned, monkeypatch):
    monkeypatch.setattr(module, "tally", lambda *args, **kwargs: pytest.fail("a tensor was read"))
    code, stdout = command("inspect", pruned, "--no-weights")
    assert code == 0
    assert "not compared (--no-weights)" in stdout
    found = document("inspect", pruned, "--no-weights")[1]
    assert found["sparsity"] is None
    assert {kind["zeros"] for kind in found["kinds"]} == {None}


def test_a_missing_model_is_an_error(tmp_path):
    code, stdout = command("inspect", tmp_path / "nothing", "--json")
    assert code == 3
    assert json.loads(stdout)["error"]["type"] == "ModelError"


# --- inspect: checkpoints ----------------------------------------------------------------------------------
def test_a_fresh_checkpoint_agrees_with_its_manifest(pruned):
    code, stdout = command("inspect", pruned)
    assert code == 0
    assert "recipe wanda-50 from dense" in stdout
    assert "as recorded in all 21 pruned tensors" in stdout
    assert all(len(line) <= 80 for line in stdout.splitlines() if str(pruned) not in line)
    found = document("inspect", pruned)[1]
    assert found["agreement"] == {"pruned": 21, "missing": [], "lost": [], "ok": True, "zeros_lost": 0}
    assert found["sparsity"] == 0.5
    assert found["origin"]["recipe"]["stages"][0]["method"] == "wanda"
    assert all(kind["kept"] * 2 == kind["numel"] for kind in found["kinds"])


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_manifests_of_other_layouts_agree_too(family, tmp_path):
    out = prune(tiny.save(family, tmp_path / "dense"), tmp_path / "out", recipe="magnitude-50")
    found = inspect_model(str(out), Silent())
    assert found.agreement is not None
    assert found.agreement.ok
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(kind.kept is not None and kind.kept == kind.numel - kind.zeros for kind in found.kinds)


def fine_tuned(pruned, folder):
    """Save the checkpoint as a trainer does after every weight of one matrix has moved."""
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.add_(0.5)
    model.save_pretrained(folder)
    return folder


def test_zeros_lost_to_fine_tuning_are_shown(pruned, tmp_path):
    folder = fine_tuned(pruned, tmp_path / "tuned")
    shutil.copy(pruned / "sparsekit.json", folder)
    code, stdout = command("inspect", folder)
    flat = " ".join(stdout.split())
    assert code == 0
    assert "LOST: 768 zeros in 1 of 21 pruned tensors" in flat
    assert "model.layers.2.mlp.down_proj.weight: 1,536 nonzero, 768 kept" in flat
    found = document("inspect", folder)[1]
    assert found["agreement"]["lost"] == [
        {"tensor": "model.layers.2.mlp.down_proj.weight", "kept": 768, "nonzero": 1536}
    ]
    assert not found["agreement"]["ok"]
    down = next(kind for kind in found["kinds"] if kind["name"] == "mlp.down_proj")
    assert down["sparsity"] == pytest.approx(1 / 3)


def test_without_the_manifest_the_claim_of_the_config_is_set_against_the_weights(pruned, tmp_path):
    folder = fine_tuned(pruned, tmp_path / "tuned")
    flat = " ".join(command("inspect", folder)[1].split())
    assert "config.json says method wanda, pattern unstructured, recipe wanda-50, sparsity 0.5" in flat
    assert "stored zeros: 0.4" in flat
    assert "there is no manifest to compare with" in flat


def test_tensors_that_are_gone_are_named(pruned, tmp_path):
    folder = tiny.save("llama", tmp_path / "shorter", tokenizer=False, num_hidden_layers=2)
    shutil.copy(pruned / "sparsekit.json", folder)
    flat = " ".join(command("inspect", folder)[1].split())
    assert "7 of 21 pruned tensors are missing or have another shape, first model.layers.2." in flat


def test_a_manifest_that_cannot_be_used_is_said(pruned):
    (pruned / "sparsekit.json").write_text("{")
    code, stdout = command("inspect", pruned)
    assert code == 0
    assert "unusable:" in stdout
    assert document("inspect", pruned)[1]["manifest_problem"]


# --- verify ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["structure", "full", "semantic"])
def test_a_sound_checkpoint_passes(level, pruned):
    code, stdout = command("verify", pruned, "--level", level)
    assert code == 0
    assert stdout.startswith("ok: ")
    assert f"level {level}" in stdout
    code, found = document("verify", pruned, "--level", level)
    assert code == 0
    assert found["ok"] is True
    assert found["problems"] == []


def test_a_flipped_bit_is_found_by_the_levels_that_read_content(pruned):
    shard = pruned / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    assert command("verify", pruned, "--level", "structure")[0] == 0
    code, stdout = command("verify", pruned)
    assert code == 3
    assert "model-00002-of-00004.safetensors: changed: sha256 differs" in stdout
    assert "1 problem. " in stdout
    code, found = document("verify", pruned, "--level", "semantic")
    assert code == 3
    assert not found["ok"]
    assert {problem["where"] for problem in found["problems"]} > {shard.name}


def test_a_filled_zero_is_found_by_its_meaning(pruned):
    shard = pruned / "model-00001-of-00004.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    entry = read_header(shard).tensors[name]
    data = bytearray(shard.read_bytes())
    data[entry.start : entry.end] = b"\x01\x3f" * entry.numel
    shard.write_bytes(data)
    code, stdout = command("verify", pruned, "--level", "semantic")
    assert code == 3
    assert f"{name}: 1,536 nonzero weights, only 768 kept by the manifest" in stdout


def test_many_problems_are_cut_short_for_people_only(pruned):
    for shard in pruned.glob("*.safetensors"):
        shard.unlink()
    code, stdout = command("verify", pruned)
    assert code == 3
    found = document("verify", pruned)[1]
    assert len(found["problems"]) > 30
    assert len(stdout.splitlines()) == 22
    assert f"and {len(found['problems']) - 20} more; --json lists all" in stdout


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    code, stdout = command("verify", tmp_path, "--json")
    assert code == 3
    assert "sparsekit.json" in json.loads(stdout)["error"]["message"]


def test_an_unknown_level_is_a_usage_error(pruned):
    assert command("verify", pruned, "--level", "deep")[0] == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_verify_imports_no_torch(damaged, pruned):
    if damaged:
        (pruned / "config.json").unlink()
    program = (
        "import sys\n"
        "from sparsekit.cli.app import build\n"
        "try:\n"
        f"    build()(['verify', {str(pruned)!r}, '--level', 'semantic'])\n"
        "except SystemExit as end:\n"
        "    print('CODE', end.code, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"CODE {3 if damaged else 0} []" in result.stdout, result.stdout + result.stderr
