"""Every damage of the file of gates is refused by file and entry; nothing runs dense because its file is broken."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparsekit.checkpoint.source import SIDECAR
from sparsekit.cli.app import build
from sparsekit.errors import CheckpointError, SparsekitError, VersionError
from sparsekit.models.gate_files import gate_file_bytes, read_gate_file
from sparsekit.models.gates import Gaussian, Placed, Threshold, TopK
from sparsekit.runtime import gates
from tests.support import tiny
from tests.support.gated import load, thin

KEY = "sparsekit_activation"
Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
ACT = "model.layers.2.mlp.act_fn"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return checkpoints of one model: gates at inputs, gates of MLPs, and packed weights with gates."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny.save("llama", folder / "model")
    uniform = ("stages.0.allocate=uniform", "stages.0.tolerance=0.04")
    thin(model, folder / "inputs", "wina-50", *uniform)
    thin(model, folder / "gates", "chess-50", *uniform, "stages.0.min_coverage=0")
    thin(model, folder / "packed", "wanda-50-teal-40", "stages.1.allocate=uniform", "stages.1.tolerance=0.04")
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """Return a function that copies one of the checkpoints."""

    def copy_of(name):
        return shutil.copytree(made / name, tmp_path / name)

    return copy_of


def rewrite(folder, change):
    """Let `change(said, tensors)` edit what the file says and holds."""
    path = folder / SIDECAR
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    answer = change(said, tensors)
    save_file(tensors, path, {KEY: answer if isinstance(answer, str) else json.dumps(said)})


def fill(name, value):
    def change(said, tensors):
        tensors[name] = tensors[name].clone()
        tensors[name][-1] = value

    return change


def put(name, tensor):
    return lambda said, tensors: tensors.update({name: tensor})


def drop(name):
    return lambda said, tensors: tensors.__delitem__(name)


def site(name, **facts):
    return lambda said, tensors: said["sites"][name].update(facts)


def say(**facts):
    return lambda said, tensors: said.update(facts)


def move(old, new, **facts):
    """Give a signal another name, and other facts."""

    def change(said, tensors):
        said["sites"][new] = {**said["sites"].pop(old), **facts}
        tensors[f"{new}.act_threshold"] = tensors.pop(f"{old}.act_threshold")

    return change


def spell(text):
    return lambda said, tensors: text


T = f"{Q}.act_threshold"
DAMAGE = {
    "NaN": (fill(T, math.nan), T, "1 of 32 values are NaN or negative"),
    "negative": (fill(T, -1.0), T, "1 of 32 values are NaN or negative"),
    "too long": (put(T, torch.ones(33)), Q, "33 values for a signal of 32"),
    "too short": (put(T, torch.ones(31)), Q, "31 values for a signal of 32"),
    "of experts": (put(T, torch.ones(4, 32)), Q, "4 x 32 values for a signal of 32"),
    "three dimensions": (put(T, torch.ones(1, 1, 32)), T, "needed 1 or 2 dimensions"),
    "empty": (put(T, torch.ones(0)), T, "needed 1 or 2 dimensions"),
    "half precision": (put(T, torch.ones(32).half()), T, "float16, needed float32"),
    "tensor missing": (drop(T), T, "the tensor is not there"),
    "stray tensor": (put("stray.act_threshold", torch.ones(32)), "stray.act_threshold", "no signal of the file has"),
    "unknown rule": (site(Q, rule="random"), Q, "rule 'random', needed threshold, top_k, gaussian or prompt"),
    "rule of another tensor": (site(Q, rule="top_k", count=4), f"{Q}.act_importance", "the tensor is not there"),
    "wrong signal": (site(Q, signal="output"), Q, "signal 'output', needed input, gate or neurons"),
    "gate of a linear": (site(Q, signal="gate"), Q, "signal gate of Linear, which is no activation function"),
    "share of two": (site(Q, share=2), Q, "share 2, needed 0 to 1"),
    "share in words": (site(Q, share="half"), Q, "share 'half', needed a number"),
    "remainder without": (site(Q, remainder=0.5), f"{Q}.act_left", "the tensor is not there"),
    "version": (say(version=2), SIDECAR, "activation file version 2, this sparsekit reads 1"),
    "version of truth": (say(version=True), SIDECAR, "does not describe any signals"),
    "dense tokens": (say(dense_tokens=-1), SIDECAR, "are malformed"),
    "prefill": (say(prefill="half"), SIDECAR, "are malformed"),
    "no weights": (say(weights={}), SIDECAR, "are malformed"),
    "weights elsewhere": (say(weights={"../config.json": 1}), SIDECAR, "are malformed"),
    "other weights": (say(weights={"model-00009-of-00009.safetensors": 9}), SIDECAR, "which is not there"),
    "no signal at all": (say(sites={}), SIDECAR, "are malformed"),
    "signals as a list": (say(sites=[Q]), SIDECAR, "are malformed"),
    "not JSON": (spell("{"), SIDECAR, "does not describe any signals"),
    "a key twice": (spell('{"version": 1, "version": 1}'), SIDECAR, "does not describe any signals"),
    "no module": (move(Q, "model.layers.9.self_attn.q_proj"), "model.layers.9", "the model has no such module"),
    "the head": (move(Q, "lm_head"), "lm_head", "it is in no block"),
    "the embeddings": (move(Q, "model.embed_tokens"), "model.embed_tokens", "it is in no block"),
    "the whole model": (move(Q, "model"), ": model", "it is in no block"),
    "all blocks": (move(Q, "model.layers"), "model.layers", "it is in no block"),
    "one block": (move(Q, "model.layers.1"), "model.layers.1", "it is in no block"),
    "an attention": (move(Q, "model.layers.1.self_attn"), "layers.1.self_attn", "signal input of LlamaAttention"),
    "no name": (move(Q, ""), SIDECAR, "it is in no block"),
    "a norm": (move(Q, "model.layers.1.input_layernorm"), "input_layernorm", "signal input of LlamaRMSNorm"),
    "an activation": (move(Q, "model.layers.1.mlp.act_fn"), "mlp.act_fn", "signal input of SiLU"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, copied):
    change, entry, message = DAMAGE[damage]
    folder = copied("inputs")
    rewrite(folder, change)
    with pytest.raises((CheckpointError, VersionError)) as caught:
        load(folder)
    text = str(caught.value)
    assert SIDECAR in text
    assert entry in text
    assert message in text
    assert caught.value.hint


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_file_is_named(keep, copied):
    folder = copied("inputs")
    path = folder / SIDECAR
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SparsekitError, match=SIDECAR):
        load(folder)


def test_a_file_without_description_is_named(copied):
    folder = copied("inputs")
    save_file({"x": torch.ones(1)}, folder / SIDECAR)
    with pytest.raises(CheckpointError, match="does not describe any signals"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (site(ACT, signal="input"), "signal input of SiLU"),
        (put(f"{ACT}.act_threshold", torch.ones(32)), "32 values for a signal of 48"),
        (move(ACT, "model.layers.2.mlp"), "signal gate of LlamaMLP, which is no activation"),
    ],
)
def test_gates_of_mlps_are_held_to_the_neurons(change, message, copied):
    folder = copied("gates")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_file_that_is_gone_is_missed(copied):
    folder = copied("inputs")
    (folder / SIDECAR).unlink()
    with pytest.raises(CheckpointError, match=r"is not there; by sparsekit\.json it holds the gates"):
        load(folder)
    (folder / "sparsekit.json").unlink()  # as the hint says
    assert not gates.attached(load(folder))


def test_the_file_of_another_model_is_named(copied, tmp_path):
    folder, other = copied("inputs"), tiny.save("qwen2", tmp_path / "qwen2")
    shutil.copy(folder / SIDECAR, other / SIDECAR)
    with pytest.raises(CheckpointError, match=r"belongs to model.* which is not there"):
        load(other)


@pytest.mark.parametrize("damage", ["NaN", "too long", "tensor missing", "the head", "not JSON", "no module"])
def test_packed_weights_do_not_hide_it(damage, copied):
    folder = copied("packed")
    rewrite(folder, DAMAGE[damage][0])
    for loading in (lambda: load(folder, packed=True), lambda: AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(CheckpointError, match=SIDECAR):
            loading()


@pytest.mark.parametrize("command", ["generate", "eval", "bench"])
def test_commands_end_with_it(command, copied, made, capfd):
    folder = copied("inputs")
    rewrite(folder, DAMAGE["NaN"][0])
    options = {
        "generate": ["--prompt", "a", "--max-new-tokens", "2"],
        "eval": ["--samples", "1", "--sequence-length", "16"],
        "bench": ["--baseline", str(made / "model"), "--prompt-tokens", "8", "--new-tokens", "4"],
    }
    result = CliRunner(env={"COLUMNS": "80"}).invoke(build(), [command, str(folder), *options[command]])
    assert result.exit_code == 3
    assert f"{SIDECAR}: {T}" in result.stderr + capfd.readouterr().err


# --- rules -------------------------------------------------------------------------------------------------
def with_gate(folder, name, gate):
    file = read_gate_file(folder)
    placed = Placed("input", gate, None)
    (folder / SIDECAR).write_bytes(gate_file_bytes(replace(file, gates={**file.gates, name: placed})))


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (TopK(33, torch.ones(32)), "the 33 largest of 32 entries"),
        (TopK(0, torch.ones(32)), "count 0, needed a whole number above 0"),
        (TopK(4, torch.ones(16)), "16 values for a signal of 32"),
        (Gaussian(math.inf), r"does not describe|deviations"),
        (Gaussian(-1.0), "deviations -1.0, needed a number of at least 0"),
    ],
)
def test_other_rules_are_held_to_the_signal(gate, message, copied):
    folder = copied("inputs")
    with_gate(folder, Q, gate)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("gate", [TopK(32, torch.ones(1)), Threshold(torch.ones(1)), Gaussian(0.5)])
def test_one_number_for_all_entries_fits(gate, copied):
    folder = copied("inputs")
    with_gate(folder, Q, gate)
    assert gates.attached(load(folder))


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (torch.ones(32, 2), torch.ones(3, 32), "do not fit"),
        (torch.ones(31, 2), torch.ones(2, 32), "a remainder of [31, 32], the linear is [32, 32]"),
        (torch.full((32, 2), math.nan), torch.ones(2, 32), "not made of finite numbers"),
    ],
)
def test_a_remainder_is_held_to_the_linear(left, right, message, copied):
    def change(said, tensors):
        said["sites"][Q]["remainder"] = 0.5
        tensors |= {f"{Q}.act_left": left, f"{Q}.act_right": right}

    folder = copied("inputs")
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert message in str(caught.value)


def test_routers_are_never_thinned_out(tmp_path):
    model = tiny.save("mixtral", tmp_path / "model")
    thin(model, tmp_path / "out", "teal-50", "stages.0.allocate=uniform", "stages.0.tolerance=0.1")
    names = [name for name, _ in load(model).named_modules() if name.endswith(".gate")]
    assert names
    with_gate(tmp_path / "out", names[0], Threshold(torch.ones(32)))
    with pytest.raises(CheckpointError, match=r"signal input of (a router|MixtralTopKRouter), needed a linear"):
        load(tmp_path / "out")


def test_what_is_written_is_read_again(made):
    for name in ("inputs", "gates", "packed"):
        file = read_gate_file(made / name)
        assert gate_file_bytes(copy.deepcopy(file)) == (made / name / SIDECAR).read_bytes()
