"""Branches that are left out: they add nothing, nothing of them is computed, and the model is whole afterwards."""

from __future__ import annotations

import pytest
import torch

from sparsekit.errors import UnsupportedFamily, UsageError
from sparsekit.models.roles import FAMILIES, family
from sparsekit.models.structure import find_stack
from sparsekit.speculate.skipping import Skipper, Skips
from tests.speculate.support import model
from tests.support import tiny

CALLED_ANYWAY = {"opt": ["fc1", "fc2"]}
"""Linears that a block calls itself: their stand-ins are called and hand on, or give nothing."""


def run(made):
    with torch.no_grad():
        return made(input_ids=tiny.ids(2, 9), use_cache=False).logits


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_block_without_branches_hands_its_stream_on(name):
    made = model(name, blocks=3)
    streams = {}
    block = find_stack(made).blocks[1]
    hook = block.register_forward_hook(lambda module, args, out: streams.update(into=args[0], out=out))
    before = run(made)
    called = []
    names = {module: path for path, module in block.named_modules()}
    inner = [module for part in ("attention", "mlp") for module in branch(made, block, part)]
    counters = [module.register_forward_hook(lambda *given: called.append(names[given[0]])) for module in inner]
    with Skipper(made).skipping(Skips((1,), (1,)))():
        called.clear()
        run(made)
    out = streams["out"]
    assert torch.equal(streams["into"], out if isinstance(out, torch.Tensor) else out[0])
    assert called == CALLED_ANYWAY.get(name, [])
    for handle in (hook, *counters):
        handle.remove()
    assert torch.equal(run(made), before)


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "qwen3_moe"])
def test_a_branch_left_out_is_a_branch_whose_last_linear_is_zero(name, part):
    made = model(name, blocks=3, branches=1.0)
    skips = Skips((1,), ()) if part == "attention" else Skips((), (1,))
    with Skipper(made).skipping(skips)():
        got = run(made)
    for module in branch(made, find_stack(made).blocks[1], part, last=True):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    torch.testing.assert_close(got, run(made))


def branch(made, block, part, *, last=False):
    """Return the linears and experts of a branch, or those that write to the stream."""
    from fnmatch import fnmatchcase

    spec = family(made)
    if part == "attention":
        names = [spec.attention.output] if last else [spec.attention.query, spec.attention.output]
    else:
        names = [name for mlp in spec.mlps for name in ((mlp.down,) if last else (mlp.up, mlp.down))]
    names = [name.partition(".*")[0] for name in names]
    return [module for path, module in block.named_modules() if any(fnmatchcase(path, name) for name in names)]


def test_an_error_inside_leaves_the_model_whole():
    made = model("llama")
    before = run(made)
    made.model.layers[1].mlp.forward = made.model.layers[1].mlp.forward  # someone else's, such as a device map's
    own = made.model.layers[1].mlp.__dict__["forward"]
    with pytest.raises(KeyError), Skipper(made).skipping(Skips((1,), (1, 2)))():
        raise KeyError
    assert made.model.layers[1].mlp.__dict__["forward"] is own
    assert "forward" not in made.model.layers[2].mlp.__dict__
    assert torch.equal(run(made), before)


@pytest.mark.parametrize("block", [0, 4, 7, -1])
def test_first_last_and_missing_blocks_always_compute(block):
    with pytest.raises(UsageError, match=f"block {block}: its mlp cannot be left out.*5 blocks"):
        Skipper(model("llama")).skipping(Skips((1,), (block,)))


def test_families_without_roles_are_refused():
    with pytest.raises(UnsupportedFamily, match="falcon"):
        Skipper(tiny.build("falcon"))
