"""One walker for every architecture: what it computes is what `from_pretrained` and a plain forward compute."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekit.checkpoint.source import open_weights
from sparsekit.models.capture import run_block
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.structure import find_stack
from sparsekit.progress import Silent
from sparsekit.walk import walk
from tests.support import tiny

FAMILIES = sorted(tiny.FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp(family), tokenizer=False)
        return made[family]

    return folder


def lazy(folder, dtype=torch.float32):
    return LazyModel(open_weights(folder), AutoConfig.from_pretrained(folder), dtype)


def record(model, samples):
    """Run a plain forward; return {(block, sample): (input, output)} and the linears' inputs."""
    seen = {}
    stack = find_stack(model)
    handles = []
    current = {}
    for index, block in enumerate(stack.blocks):

        def hook(module, args, kwargs, out, index=index):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[index, current["sample"]] = (hidden, out if torch.is_tensor(out) else out[0])

        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        for sample, ids in enumerate(samples):
            current["sample"] = sample
            model(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_forward_before_and_after_pruning(family, folders):
    """Dense replay is the plain forward; after each block is changed, later inputs are the changed model's."""
    folder = folders(family)
    samples = tiny.ids(3)
    reference = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    dense = record(reference, samples)
    model = lazy(folder)
    inputs = {}
    changed = {}
    for visit in walk(model, samples, Silent()):
        for sample, call in enumerate(visit._walk.calls[visit.index]):
            hidden = visit._walk.hidden[sample]
            inputs[visit.index, sample] = hidden.clone()
            if visit.index == 0:  # later blocks see changed inputs: compared below
                torch.testing.assert_close(run_block(visit.block, hidden, call), dense[0, sample][1], atol=1e-5, rtol=0)
        for linear in visit.linears:
            halved = linear.weight() * (torch.arange(linear.info.in_features) % 2)
            linear.replace(halved)
        prefix = model.stack.prefix(visit.index) + "."
        changed |= {k: v.clone() for k, v in model.module.state_dict().items() if k.startswith(prefix)}
    _, unexpected = reference.load_state_dict(changed, strict=False)
    assert not unexpected
    again = record(reference, samples)
    assert inputs.keys() == again.keys()
    for key, hidden in inputs.items():
        torch.testing.assert_close(hidden, again[key][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_blocks_is_a_linear(family, folders):
    model = lazy(folders(family))
    found = [linear for index in range(model.blocks) for linear in model.stack.linears(index)]
    assert model.blocks == 3
    assert sum(linear.info.numel for linear in found) == model.stack.matrix_weights()
    assert len({linear.name for linear in found}) == len(found)
    assert not any("lm_head" in linear.name or "router" in linear.name for linear in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_goes_back_to_the_tensors_it_came_from(family, folders):
    """Loading through transformers' conversion and reverting it is the identity on names, shapes and bits."""
    from safetensors.torch import load_file

    folder = folders(family)
    stored = load_file(folder / "model.safetensors")
    model = lazy(folder)
    seen = set(model.keys(None))
    for index in range(model.blocks):
        model.load_block(index)
        prefix = model.stack.prefix(index) + "."
        state = {k: v for k, v in model.module.state_dict().items() if k.startswith(prefix)}
        back = model.to_checkpoint(state)
        assert set(back) == set(model.keys(index))
        for name, tensor in back.items():
            assert torch.equal(tensor, stored[name]), name
        seen |= set(back)
        model.release_block(index)
        assert all(p.is_meta for p in model.module.parameters())
    assert seen == set(stored)


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_inputs_of_experts_are_what_the_experts_compute_with(family, folders):
    """gate_up sees the tokens routed to the expert; down_proj the gated intermediate: their products are the output."""
    samples = tiny.ids(1)
    model = lazy(folders(family))
    for visit in walk(model, samples, Silent()):
        taps = {}
        from sparsekit.models.linears import is_experts, tap_inputs

        experts = next(m for m in visit.block.modules() if is_experts(m))
        calls = {}
        handle = experts.register_forward_hook(lambda m, args, out, calls=calls: calls.update(args=args, out=out))
        handles = tap_inputs(visit.linears, lambda name, x, taps=taps: taps.__setitem__(name, x.clone()))
        run_block(visit.block, visit._walk.hidden[0], visit._walk.calls[visit.index][0])
        for h in (*handles, handle):
            h.remove()
        hidden, chosen, weights = calls["args"]
        total = torch.zeros(hidden.reshape(-1, hidden.shape[-1]).shape)
        for linear in visit.linears:
            if linear.parameter != "down_proj" or linear.expert is None:
                continue
            rows = (chosen == linear.expert).any(-1).nonzero()[:, 0]
            out = taps[linear.name] @ linear.weight().T
            if getattr(experts, "has_bias", False):
                out = out + experts.down_proj_bias[linear.expert]
            slot = (chosen[rows] == linear.expert).float().argmax(-1)
            total[rows] += out * weights[rows, slot][:, None]
        torch.testing.assert_close(total, calls["out"].reshape(total.shape), atol=1e-4, rtol=1e-4)


def test_starved_experts_borrow_from_their_siblings_and_say_so(folders):
    samples = tiny.ids(1, 8)
    for visit in walk(lazy(folders("qwen3_moe")), samples, Silent()):
        stats = visit.collect(visit.linears, frozenset({"sumsq"}))
        for linear in visit.linears:
            assert (stats[linear.name]["sumsq"].sumsq > 0).all(), linear.name
        assert any("tokens, sumsq filled up" in note for note in visit.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_arrive_in_the_checkpoint_dtype(dtype, tmp_path):
    folder = tiny.save("llama", tmp_path, tokenizer=False, dtype=dtype)
    model = lazy(folder, dtype)
    block = model.load_block(1)
    assert {p.dtype for p in block.parameters()} == {dtype}
