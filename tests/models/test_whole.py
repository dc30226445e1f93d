"""A model whole in memory: losses are the model's own, and a probe leaves no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekit.checkpoint.source import open_weights
from sparsekit.errors import NonFinite
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.whole import LoadedModel
from tests.support import tiny

FAMILIES = ["llama", "gemma2", "gpt2", "bloom", "mixtral"]


def loaded(folder, ids, dtype=torch.float32, advance=lambda: None):
    model = LazyModel(open_weights(folder), AutoConfig.from_pretrained(folder), dtype)
    return model, LoadedModel(model, ids, advance)


def infos(model):
    return [linear.info for index in range(model.blocks) for linear in model.stack.linears(index)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_is_that_of_the_plain_model_with_the_changed_weight(family, tmp_path):
    folder = tiny.save(family, tmp_path, tokenizer=False)
    ids = tiny.ids(2, 20)
    model, whole = loaded(folder, ids)
    reference = LazyModel(open_weights(folder), AutoConfig.from_pretrained(folder), torch.float32)
    reference.load_outer()
    for index in range(reference.blocks):
        reference.load_block(index)
    targets = {x.name: x for index in range(model.blocks) for x in reference.stack.linears(index)}
    generator = torch.Generator().manual_seed(1)
    # every third linear, in the order of the model, then one of the first block again
    chosen = [*infos(model)[::3], infos(model)[1]]
    for number, info in enumerate(chosen):
        change = 0.1 * torch.randn(info.out_features, info.in_features, generator=generator)
        got = whole.loss(info, whole.weight(info) + change, number % 2)
        target = targets[info.name]
        own = target.weight().clone()
        target.replace(own + change)
        with torch.no_grad():
            sample = ids[number % 2][None]
            wanted = reference.module(input_ids=sample, labels=sample, use_cache=False).loss
        target.replace(own)
        assert got == pytest.approx(float(wanted), rel=1e-5), info.name


def test_losses_are_those_of_from_pretrained(tmp_path):
    folder = tiny.save("llama", tmp_path, tokenizer=False)
    ids = tiny.ids(2, 20)
    model, whole = loaded(folder, ids)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for info in infos(model):
        got = whole.loss(info, whole.weight(info), 1)
        assert got == pytest.approx(reference(input_ids=ids[1:], labels=ids[1:]).loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_probe_leaves_every_bit(family, tmp_path):
    folder = tiny.save(family, tmp_path, tokenizer=False, dtype=torch.bfloat16)
    steps = []
    model, whole = loaded(folder, tiny.ids(1, 20), torch.bfloat16, lambda: steps.append(1))
    before = {name: tensor.clone() for name, tensor in whole._model.module.state_dict().items()}
    assert all(tensor.dtype == torch.float32 for tensor in before.values() if tensor.is_floating_point())
    for info in infos(model):
        for sign in (1, -1):
            weight = whole.weight(info)
            whole.loss(info, weight + sign * 1e-3, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in whole._model.module.state_dict().items())
    assert len(steps) == len(infos(model))
    assert all(parameter.is_meta for parameter in model.module.parameters())  # the lazy model stays as it was


def test_a_probe_that_fails_leaves_every_bit_too(tmp_path):
    folder = tiny.save("llama", tmp_path, tokenizer=False)
    model, whole = loaded(folder, tiny.ids(1, 20))
    info = infos(model)[4]
    own = whole.weight(info).clone()
    with pytest.raises(NonFinite, match=rf"{info.name}: the loss of sample 0 is"):
        whole.loss(info, own * float("inf"), 0)
    assert torch.equal(whole.weight(info), own)


def test_blocks_written_by_this_run_are_read_from_there(tmp_path):
    """A later stage probes what the earlier one made."""
    from safetensors.torch import save_file

    folder = tiny.save("llama", tmp_path / "m", tokenizer=False)
    model, whole = loaded(folder, tiny.ids(1, 20))
    info = infos(model)[0]
    before = whole.loss(info, whole.weight(info), 0)
    block = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    shard = {key: block[key] * 0.5 if key == f"{info.name}.weight" else block[key] for key in model.keys(0)}
    save_file(shard, tmp_path / "shard.safetensors", metadata={"format": "pt"})
    model.redirect(0, tmp_path / "shard.safetensors")
    redirected = LoadedModel(model, tiny.ids(1, 20), lambda: None)
    assert torch.equal(redirected.weight(info), whole.weight(info) * 0.5)
    assert redirected.loss(info, redirected.weight(info), 0) != before
