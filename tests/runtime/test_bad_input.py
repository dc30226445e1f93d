"""A damaged packed checkpoint ends in a typed error that names file and tensor, never in a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsekit.checkpoint.safetensors_file import read_header
from sparsekit.errors import SparsekitError
from sparsekit.pack.files import METADATA
from sparsekit.pack.verify import verify
from sparsekit.runtime import native
from tests.runtime.support import both

SHARD = "sparsekit_model-00002-of-00004.safetensors"
WIDE = {"hidden_size": 64, "intermediate_size": 128}


MODES = ["dense", "packed"] if native.available() else ["dense"]


@pytest.fixture(params=MODES)
def runtime(request, monkeypatch):
    """Both ways of loading: unpacked, and with layers that multiply with packed weights."""
    monkeypatch.setenv("SPARSEKIT_RUNTIME", request.param)
    return request.param


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": both("llama", folder / "llama", form="auto", **WIDE)[1],
        "mixtral": both("mixtral", folder / "mixtral")[1],
    }


@pytest.fixture(params=["llama", "mixtral"])
def packed(request, pristine, tmp_path):
    """A copy that the test may spoil."""
    return Path(shutil.copytree(pristine[request.param], tmp_path / "packed"))


def change(folder: Path, edit) -> str:
    """Let `edit(stem, tensors, facts)` spoil one packed tensor of SHARD; return that tensor's name."""
    path = folder / SHARD
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    facts = json.loads(metadata[METADATA])
    name = next((key for key in sorted(facts) if "expert" in key), min(facts))
    edit(name.removesuffix("weight"), tensors, facts)
    save_file(tensors, path, {**metadata, METADATA: json.dumps(facts)})
    index = folder / "sparsekit_model.safetensors.index.json"
    document = json.loads(index.read_text())
    names = {key: file for key, file in document["weight_map"].items() if file != SHARD}
    index.write_text(json.dumps({**document, "weight_map": names | dict.fromkeys(tensors, SHARD)}))
    return name


def flip_mask(stem, tensors, facts):
    tensors[f"{stem}weight_bitmask"][0, 0] ^= 1


def shift_offset(stem, tensors, facts):
    tensors[f"{stem}weight_row_offsets"][3] += 1


def drop_offsets(stem, tensors, facts):
    del tensors[f"{stem}weight_row_offsets"]


def drop_all_parts(stem, tensors, facts):
    for name in [name for name in tensors if name.startswith(stem)]:
        del tensors[name]


def shape_of_another(stem, tensors, facts):
    tensors[f"{stem}weight_shape"] = tensors[f"{stem}weight_shape"].flip(0) + 1


def wrong_count(stem, tensors, facts):
    facts[f"{stem}weight"]["nnz"] += 1


def facts_of_another(stem, tensors, facts):
    facts[f"{stem}weight"] = {**facts[f"{stem}weight"], "shape": [8, 8]}


def unknown_layout(stem, tensors, facts):
    facts[f"{stem}weight"]["layout"] = "csr"


def unknown_encoding(stem, tensors, facts):
    facts[f"{stem}weight"]["encoding"] = "zip"


def other_pattern(stem, tensors, facts):
    facts[f"{stem}weight"]["pattern"] = "2:4"


def no_entry(stem, tensors, facts):
    del facts[f"{stem}weight"]


def values_cut(stem, tensors, facts):
    name = f"{stem}weight_nz" if f"{stem}weight_nz" in tensors else f"{stem}weight_low"
    tensors[name] = tensors[name][:-1].contiguous()


def moved_mask(stem, tensors, facts):
    """A bitmask that keeps as many weights, in other rows."""
    tensors[f"{stem}weight_bitmask"][0] = 255
    tensors[f"{stem}weight_bitmask"][1] = 0


def falling_offsets(stem, tensors, facts):
    tensors[f"{stem}weight_row_offsets"] = tensors[f"{stem}weight_row_offsets"].flip(0).contiguous()


def huge_offset(stem, tensors, facts):
    tensors[f"{stem}weight_row_offsets"][-1] = 2**62


def mask_of_another_dtype(stem, tensors, facts):
    tensors[f"{stem}weight_bitmask"] = tensors[f"{stem}weight_bitmask"].to(torch.int32)


DAMAGE = [
    flip_mask, shift_offset, drop_offsets, drop_all_parts, shape_of_another, wrong_count, facts_of_another,
    unknown_layout, unknown_encoding, other_pattern, no_entry, values_cut, moved_mask, falling_offsets,
    huge_offset, mask_of_another_dtype,
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "manifest"),
    # A bitmask is read without its pattern: only the manifest can tell that the pattern is another.
    [(damage, manifest) for damage in DAMAGE for manifest in (True, False) if manifest or damage is not other_pattern],
)
def test_damage_is_named_when_transformers_loads(packed, damage, manifest, runtime):
    name = change(packed, damage)
    if not manifest:
        (packed / "sparsekit.json").unlink()
    with pytest.raises((SparsekitError, RuntimeError)) as caught:
        AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    assert isinstance(caught.value, SparsekitError), caught.value
    text = str(caught.value)
    assert name in text
    assert SHARD in text or "in the manifest" in text
    assert "\n" not in text


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_by_verify(packed, damage):
    name = change(packed, damage)
    problems = verify(packed, "semantic").problems
    assert any(name in problem.where for problem in problems if "sha256" not in problem.message), problems


def test_sound_checkpoints_verify(pristine):
    for folder in pristine.values():
        for level in ("structure", "full", "semantic"):
            assert verify(folder, level).ok


def test_structure_and_full_need_no_torch(pristine):
    code = (
        "import sys; from pathlib import Path; from sparsekit.pack.verify import verify\n"
        f"assert verify(Path({str(pristine['llama'])!r}), 'structure').ok\n"
        f"assert verify(Path({str(pristine['llama'])!r}), 'full').ok\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_format_of_the_future(packed, runtime):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(SparsekitError, match="format version 2, this sparsekit reads 1"):
        AutoModelForCausalLM.from_pretrained(packed, dtype="auto")


def test_a_manifest_that_disagrees(packed, runtime):
    path = packed / "sparsekit.json"
    manifest = json.loads(path.read_text())
    name = min(manifest["packed"])
    manifest["packed"][name]["kept"] -= 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(SparsekitError, match="in the manifest") as caught:
        AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    assert name in str(caught.value)
    assert any(name in problem.where for problem in verify(packed, "semantic").problems)


def test_a_truncated_shard(packed, runtime):
    path = packed / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SparsekitError, match=SHARD):
        AutoModelForCausalLM.from_pretrained(packed, dtype="auto")


@pytest.mark.parametrize("damage", [flip_mask, unknown_layout, drop_offsets], ids=lambda damage: damage.__name__)
def test_eval_says_it_on_one_line(packed, damage):
    name = change(packed, damage)
    arguments = ["eval", str(packed), "--samples", "1", "--sequence-length", "16", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", "from sparsekit.cli.app import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1, done.stderr
    assert name in errors[0]
    assert SHARD in errors[0]


def test_no_zeros_stand_in_for_weights_when_loading_is_tried_again(packed, pristine, runtime):
    """An error is raised by the load it belongs to, and a sound checkpoint loads after it."""
    change(packed, flip_mask)
    for _ in range(2):
        with pytest.raises(SparsekitError):
            AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    model = AutoModelForCausalLM.from_pretrained(pristine["llama"], dtype="auto")
    assert all(bool(torch.isfinite(p).all()) and bool(p.any()) for p in model.state_dict().values())
