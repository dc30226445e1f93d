"""The commands around a checkpoint with activation sparsity: convert carries it along, inspect names it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from sparsekit.checkpoint.source import SIDECAR
from sparsekit.cli.app import build
from sparsekit.convert import convert
from sparsekit.errors import ChecksumError, UsageError
from sparsekit.inspect_model import inspect_model
from sparsekit.models.gate_files import read_gate_file
from sparsekit.pack.verify import verify
from sparsekit.progress import Silent
from sparsekit.run import execute
from sparsekit.runtime import gates
from tests.support import tiny
from tests.support.gated import load, plan, thin

SETS = {"teal-40": 0, "wanda-50-teal-40": 1}
PROTOCOL = "all but the first token of a text; in generation the prompt is dense"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = tiny.save("llama", folder / "model")
    for recipe, stage in SETS.items():
        thin(model, folder / recipe, recipe, f"stages.{stage}.allocate=uniform", f"stages.{stage}.tolerance=0.04")
    return folder


def command(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(build(), [str(argument) for argument in arguments])


def flat(text):
    return " ".join(text.split())


def run(model):
    with torch.no_grad():
        return model(tiny.ids(2, 16)).logits


# --- convert -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("recipe", "to"), [("teal-40", "dense"), ("wanda-50-teal-40", "dense"),
                                            ("wanda-50-teal-40", "bitmask")])  # fmt: skip
def test_gates_go_along_and_name_the_new_files(recipe, to, made, tmp_path):
    out = tmp_path / "out"
    convert(made / recipe, to, out, Silent())
    before, after = read_gate_file(made / recipe), read_gate_file(out)
    assert after.weights == {path.name: path.stat().st_size for path in out.glob("*model-*.safetensors")}
    assert (after.shares, after.prefill, after.dense_tokens) == (before.shares, before.prefill, before.dense_tokens)
    for name, placed in before.gates.items():
        assert torch.equal(after.gates[name].gate.t, placed.gate.t)
    assert verify(out, "semantic").ok
    assert json.loads((out / "sparsekit.json").read_text())["activations"]["method"] == "teal"
    assert SIDECAR not in (out / next(out.glob("*.index.json")).name).read_text()
    model = load(out)
    assert gates.attached(model)
    assert torch.equal(run(model), run(load(made / recipe)))
    assert convert(made / recipe, to, out, Silent()).already_finished


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_values_that_change_the_weights_are_refused(values, made, tmp_path):
    with pytest.raises(UsageError, match="changes the weights that the activation sparsity"):
        convert(made / "wanda-50-teal-40", "auto", tmp_path / "out", Silent(), values=values)
    assert not (tmp_path / "out").exists()


def test_gates_that_were_changed_are_not_carried_along(made, tmp_path):
    folder = shutil.copytree(made / "teal-40", tmp_path / "copy")
    data = bytearray((folder / SIDECAR).read_bytes())
    data[-1] ^= 1
    (folder / SIDECAR).write_bytes(data)
    with pytest.raises(ChecksumError, match=SIDECAR):
        convert(folder, "dense", tmp_path / "out", Silent())


# --- inspect -----------------------------------------------------------------------------------------------
def test_inspect_says_what_is_skipped(made):
    shown = flat(command("inspect", made / "teal-40", "-q").stdout)
    assert "teal thins out 21 signals, 0.4" in shown
    assert PROTOCOL in shown
    assert "no tensor is recorded as pruned" in shown
    report = json.loads((made / "teal-40" / "report.json").read_text())
    found = inspect_model(str(made / "teal-40"), Silent(), weights=False)
    assert found.gates.sparsity == report["activations"]["held_out"]["sparsity"]
    assert found.to_json()["gates"]["method"] == "teal"
    assert inspect_model(str(made / "model"), Silent(), weights=False).gates is None


def test_inspect_of_packed_weights_holds_the_gates_to_the_dense_shapes(made):
    assert inspect_model(str(made / "wanda-50-teal-40"), Silent()).gates.signals == 21


def test_without_manifest_the_file_speaks_for_itself(made, tmp_path):
    folder = shutil.copytree(made / "teal-40", tmp_path / "copy")
    (folder / "sparsekit.json").unlink()
    found = inspect_model(str(folder), Silent(), weights=False).gates
    assert (found.method, found.signals, found.protocol) == (None, 21, PROTOCOL)
    assert found.sparsity == pytest.approx(0.4, abs=0.06)
    assert "an unknown method thins out 21 signals" in flat(command("inspect", folder, "-q").stdout)


def test_inspect_names_a_damaged_file(made, tmp_path):
    folder = shutil.copytree(made / "teal-40", tmp_path / "copy")
    (folder / SIDECAR).write_bytes(b"nothing")
    result = command("inspect", folder, "-q")
    assert result.exit_code == 0
    assert "unusable: " in flat(result.stdout)
    assert SIDECAR in "".join(result.stdout.split())


# --- prune and generate ------------------------------------------------------------------------------------
def test_a_dry_run_shows_signals_and_protocol(made):
    options = ("--set", "calibration.source=builtin", "--set", "calibration.sequence_length=48", "--dry-run")
    shown = flat(command("prune", made / "model", "-r", "teal-40", *options).stdout)
    assert "teal: 21 signals in 3 blocks, 100.0% of the block weights" in shown
    assert "mlp.down_proj 3" in shown
    assert "skips 0.4000 of what they are multiplied with" in shown
    assert PROTOCOL in shown
    shown = flat(command("prune", made / "model", "-r", "teal-ppl1", *options).stdout)
    assert "as much as +1.00% perplexity on text kept apart allows" in shown


def test_pruning_a_sparse_model_says_that_its_gates_are_dropped(made, tmp_path):
    prepared = plan(made / "teal-40", "magnitude-50")
    assert [note for note in prepared.notes if SIDECAR in note and "left out" in note]
    out = execute(prepared, tmp_path / "out", Silent(), evaluation=False).out
    assert not (out / SIDECAR).exists()
    assert not gates.attached(load(out))
    assert verify(out, "semantic").ok
    assert not [note for note in plan(made / "model", "magnitude-50").notes if SIDECAR in note]


def test_generate_says_how_many_signals_are_thinned_out(made):
    options = ("--prompt", "a", "--max-new-tokens", "3", "--no-chat")
    result = command("generate", made / "teal-40", *options)
    assert result.exit_code == 0
    assert "21 signals thinned out" in result.stderr
    document = json.loads(command("generate", made / "teal-40", *options, "--json").stdout)
    assert document["runtime"]["signals"] == 21
    assert "thinned" not in command("generate", made / "model", *options).stderr
