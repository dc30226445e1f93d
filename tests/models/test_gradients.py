"""Gradients a block at a time are autograd's of the whole loss, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sparsekit.checkpoint.source import open_weights
from sparsekit.errors import NonFinite, SparsekitError
from sparsekit.models.gradients import BlockGradients
from sparsekit.models.lazy_model import LazyModel
from sparsekit.progress import Silent
from sparsekit.stats.grad import Grad
from sparsekit.walk import walk
from tests.support import tiny

FAMILIES = sorted(tiny.FAMILIES)


def lazy(folder, dtype=torch.float32):
    return LazyModel(open_weights(folder), AutoConfig.from_pretrained(folder), dtype)


def collected(model, ids, first=0):
    """Gradients of all linears from block `first` on: {name: [sample][out, in]}."""
    gradients = BlockGradients(model, ids, Silent(), "test")
    found = {}
    for index in range(first, model.blocks):
        found |= gradients.collect(index, [x.name for x in model.stack.linears(index)], {"grad": Grad})
    return {name: stats["grad"].samples for name, stats in found.items()}


def autograd(folder, ids):
    """The same, of the whole model at once."""
    model = lazy(folder)
    model.load_outer()
    for index in range(model.blocks):
        model.load_block(index)
    model.module.requires_grad_(True)
    linears = [linear for index in range(model.blocks) for linear in model.stack.linears(index)]
    found = {linear.name: [] for linear in linears}
    for sample in ids:
        model.module.zero_grad()
        model.module(input_ids=sample[None], labels=sample[None], use_cache=False).loss.backward()
        for linear in linears:
            parameter = linear.module.get_parameter(linear.parameter)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[linear.name].append(linear.view(gradient).clone())
    return found


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        for ours, theirs in zip(got[name], wanted[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 + 1e-5 * float(theirs.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_loss(family, tmp_path):
    folder = tiny.save(family, tmp_path, tokenizer=False)
    ids = tiny.ids(3, 20)
    wanted = autograd(folder, ids)
    assert_same(collected(lazy(folder, torch.bfloat16), ids), wanted)
    # Far from nothing, and the samples differ.
    assert all(float(sample.abs().max()) > 1e-4 for sample in next(iter(wanted.values())))
    assert not torch.allclose(*next(iter(wanted.values()))[:2], rtol=0.1)


def test_tied_embeddings_are_part_of_the_loss_only(tmp_path):
    folder = tiny.save("llama", tmp_path, tokenizer=False, tie_word_embeddings=True)
    assert_same(collected(lazy(folder), tiny.ids(2, 20)), autograd(folder, tiny.ids(2, 20)))


def test_an_expert_without_tokens_has_a_gradient_of_zero(tmp_path):
    folder = tiny.save("mixtral", tmp_path, tokenizer=False)
    ids = tiny.ids(2, 8)[:, :2].repeat(1, 4)  # few distinct tokens
    got, wanted = collected(lazy(folder), ids), autograd(folder, ids)
    assert_same(got, wanted)
    assert any(not sample.any() for name, samples in got.items() if "expert" in name for sample in samples)


def test_later_blocks_alone_and_threads_change_no_bit(tmp_path):
    folder = tiny.save("llama", tmp_path, tokenizer=False)
    whole = collected(lazy(folder), tiny.ids(4, 20))
    threads = torch.get_num_threads()
    try:
        for number, first in ((1, 1), (2, 0), (3, 2)):
            torch.set_num_threads(number)
            part = collected(lazy(folder), tiny.ids(4, 20), first)
            assert 0 < len(part) <= len(whole)
            for name, samples in part.items():
                assert all(map(torch.equal, samples, whole[name])), name
    finally:
        torch.set_num_threads(threads)


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path, tokenizer=False)
    most = []
    load = LazyModel.load_block

    def counted(self, index):
        block = load(self, index)
        most.append(sum(not all(p.is_meta for p in other.parameters()) for other in self.stack.blocks))
        return block

    monkeypatch.setattr(LazyModel, "load_block", counted)
    collected(lazy(folder), tiny.ids(2, 20))
    assert set(most) == {1}


def test_the_walk_delivers_the_dense_models_gradients(tmp_path):
    """Whatever a visitor changes, also where a written shard takes a block's place before anyone asks."""
    folder = tiny.save("llama", tmp_path / "m", tokenizer=False)
    ids = tiny.ids(2, 20)
    wanted = autograd(folder, ids)
    model = lazy(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: tensors[key] * 0.5 for key in model.keys(0)}, tmp_path / "shard.safetensors", {"format": "pt"})
    for visit in walk(model, ids, Silent(), probed=ids):
        if visit.index == 0:
            visit.adopt(tmp_path / "shard.safetensors")
            continue
        stats = visit.collect(visit.linears, frozenset({"grad", "sumsq"}))
        got = {name: kinds["grad"].samples for name, kinds in stats.items()}
        assert_same(got, {name: wanted[name] for name in got})
        assert all(kinds["sumsq"].tokens == ids.numel() for kinds in stats.values())
        for linear in visit.linears:
            linear.replace(linear.weight() * 0.1)


def test_a_walk_without_probes_has_no_gradients(tmp_path):
    model = lazy(tiny.save("llama", tmp_path, tokenizer=False))
    visit = next(walk(model, tiny.ids(), Silent()))
    with pytest.raises(SparsekitError, match="gradients asked for in a walk without probes"):
        visit.collect(visit.linears, frozenset({"grad"}))


def test_a_loss_that_is_no_number_is_named(tmp_path):
    folder = tiny.save("llama", tmp_path, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFinite, match="the loss of sample 0 is nan"):
        collected(lazy(folder), tiny.ids(2, 20))


def test_gradients_of_reordered_inputs_are_refused():
    with pytest.raises(SparsekitError, match="reorders inputs and needs gradients is not supported"):
        Grad(4).reordered(torch.arange(4))
