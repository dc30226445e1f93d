"""Gates of packed checkpoints from the Hub: plain from_pretrained fetches their file, or refuses to run dense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsekit.checkpoint.source import SIDECAR
from sparsekit.convert import convert
from sparsekit.errors import CheckpointError, ChecksumError
from sparsekit.pack.verify import verify
from sparsekit.progress import Silent
from sparsekit.runtime import gates
from tests.support import tiny
from tests.support.gated import load, thin
from tests.support.hub_server import HubServer

CHILD = """
import json, sys
import sparsekit, torch
from sparsekit.errors import SparsekitError
from sparsekit.runtime import gates
from transformers import AutoModelForCausalLM
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
    with torch.no_grad():
        logits = model(torch.tensor(json.loads(sys.argv[3]))).logits
    print(json.dumps({"attached": gates.attached(model), "logits": logits.tolist()}))
except SparsekitError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""
IDS = tiny.ids(1, 12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return checkpoints that transformers loads through sparsekit: packed weights, and a rotated stream."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save("llama", folder / "model")
    for recipe in ("wanda-50-teal-40", "wina-rotated-50"):
        thin(folder / "model", folder / recipe, recipe, "stages.1.allocate=uniform", "stages.1.tolerance=0.08")
    return folder


def entry(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def change(folder, update):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    update(config["quantization_config"])
    path.write_text(json.dumps(config))


def from_hub(hub, home, repo, **options):
    child = [sys.executable, "-c", CHILD, repo, json.dumps(options), json.dumps(IDS.tolist())]
    found = subprocess.run(child, env=hub.environment(home), capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("recipe", "subfolder"), [("wanda-50-teal-40", ""), ("wina-rotated-50", "inner")])
def test_plain_from_pretrained_fetches_the_gates(recipe, subfolder, made, tmp_path):
    repo = tmp_path / "root" / "models" / "org" / "thin"
    shutil.copytree(made / recipe, repo / subfolder)
    with HubServer(tmp_path / "root") as hub:
        found = from_hub(hub, tmp_path / "home", "org/thin", subfolder=subfolder)
        assert found["attached"]
        torch.testing.assert_close(torch.tensor(found["logits"]), logits(load(made / recipe)), atol=1e-3, rtol=1e-3)
        assert any(SIDECAR in request for request in hub.requests)
        if subfolder:
            return
        hub.requests.clear()
        assert from_hub(hub, tmp_path / "home", "org/thin", subfolder=subfolder)["attached"]  # out of the cache
        assert not [request for request in hub.requests if request.startswith("GET") and SIDECAR in request]


def test_a_repository_without_them_is_refused(made, tmp_path):
    repo = shutil.copytree(made / "wanda-50-teal-40", tmp_path / "root" / "models" / "org" / "thin")
    (repo / SIDECAR).unlink()
    with HubServer(tmp_path / "root") as hub:
        found = from_hub(hub, tmp_path / "home", "org/thin")
    assert found["error"] == "CheckpointError"
    assert "is not there; by config.json it holds the gates of this checkpoint" in found["message"]


@pytest.mark.parametrize("recipe", ["wanda-50-teal-40", "wina-rotated-50"])
def test_folders(recipe, made, tmp_path):
    folder = shutil.copytree(made / recipe, tmp_path / "copy")
    assert gates.attached(AutoModelForCausalLM.from_pretrained(folder))
    (folder / "sparsekit.json").unlink()
    (folder / SIDECAR).rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"is not there; by config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)
    data = bytearray((tmp_path / "kept").read_bytes())
    data[-1] ^= 1
    (folder / SIDECAR).write_bytes(data)
    with pytest.raises(ChecksumError, match=r"sha256 .* by config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / SIDECAR).unlink()
    change(folder, lambda said: said.pop("activations"))  # as the hint says
    assert not gates.attached(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    "said", [[], {}, {"file": SIDECAR}, {"file": "../x", "sha256": "0" * 64}, {"sha256": "0" * 64}]
)
def test_a_malformed_entry_is_refused(said, made, tmp_path):
    folder = shutil.copytree(made / "wanda-50-teal-40", tmp_path / "copy")
    change(folder, lambda entry: entry.update(activations=said))
    with pytest.raises(CheckpointError, match=r"quantization_config\.activations"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_checkpoints_of_before_load_as_they_did(made, tmp_path):
    folder = shutil.copytree(made / "wanda-50-teal-40", tmp_path / "copy")
    change(folder, lambda said: said.pop("activations"))
    assert gates.attached(AutoModelForCausalLM.from_pretrained(folder))
    assert gates.attached(load(folder))


def test_a_converted_checkpoint_names_its_own_file(made, tmp_path):
    convert(made / "wanda-50-teal-40", "bitmask", tmp_path / "packed", Silent())
    assert gates.attached(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    assert entry(tmp_path / "packed")["activations"]["file"] == SIDECAR
    assert verify(tmp_path / "packed", "semantic").ok
    convert(made / "wanda-50-teal-40", "dense", tmp_path / "dense", Silent())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_what_is_saved_again_names_no_file_that_is_not_there(made, tmp_path):
    AutoModelForCausalLM.from_pretrained(made / "wina-rotated-50").save_pretrained(tmp_path / "saved")
    assert "activations" not in entry(tmp_path / "saved")
    assert not gates.attached(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
