"""`StreamingLinear` is `nn.Linear` up to rounding, and a model does not notice the exchange."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit.runtime import ops
from sparsekit.runtime.dense import FEW_TOKENS, StreamingLinear, use_streaming
from tests.runtime.support import converted, load
from tests.support import tiny

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer(dtype=torch.bfloat16, bias=True, rows=70, cols=50):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(cols, rows, bias=bias, dtype=dtype))
    assert use_streaming(made) == 1
    return made[0]


@pytest.fixture
def streamed(monkeypatch):
    """Count the calls that the kernel takes."""
    calls = []

    kernel = ops.linear_dense

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(ops, "linear_dense", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype, bias, streamed):
    made = layer(dtype, bias)
    inputs = [torch.randn(*shape, 50).to(dtype) for shape in [(1, 1), (4,), (2, 2), (1, 5), (), (0,)]]
    inputs += [torch.randn(50, 3).to(dtype).T, torch.randn(3, 2, 50).to(dtype)[:, 1]]
    with torch.no_grad():
        for x in inputs:
            y, expected = made(x), F.linear(x.double(), made.weight.double(), made.bias.double() if bias else None)
            assert y.dtype == dtype
            assert y.shape == expected.shape
            torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-2 if dtype != torch.float32 else 1e-5)
    assert len(streamed) == 7  # all but the five tokens


def test_what_the_kernel_does_not_take_goes_to_torch(streamed):
    made = layer()
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            made(torch.randn(1, 50))  # as nn.Linear: dtypes differ
        with torch.autocast("cpu", torch.float16):
            assert made(torch.randn(1, 50).bfloat16()).dtype == torch.float16
        made.weight = nn.Parameter(torch.randn(50, 70).bfloat16().T)
        made(torch.randn(1, 50).bfloat16())
        assert made.double()(torch.randn(1, 50).double()).dtype == torch.float64
        assert made.to("meta")(torch.randn(1, 50, device="meta").double()).is_meta
    assert not streamed


def test_wrong_shapes_are_refused():
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer()(torch.randn(1, 49).bfloat16())


def test_gradients():
    made, x = layer(torch.float32), torch.randn(2, 2, 50, requires_grad=True)
    leaves = [x, made.weight, made.bias]
    got = torch.autograd.grad(made(x).square().sum(), leaves)
    expected = torch.autograd.grad(F.linear(x, made.weight, made.bias).square().sum(), leaves)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_compiled():
    made = layer()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (1, FEW_TOKENS + 1):
            x = torch.randn(tokens, 50).bfloat16()
            assert torch.equal(compiled(x), made(x))


def test_copies_and_pickles():
    made, x = layer(), torch.randn(2, 50).bfloat16()
    with torch.no_grad():
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert type(other) is StreamingLinear
            assert torch.equal(other(x), made(x))


def test_use_streaming_changes_plain_layers_only():
    class Special(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4), Special(4, 4), nn.Linear(4, 4, device="meta"), nn.Embedding(4, 4)])
    model[2:].requires_grad_(False)
    shared = model[0].weight
    model[3].weight = shared
    before = model.state_dict()
    assert use_streaming(model) == 1
    assert use_streaming(model) == 0
    assert [type(module) for module in model] == [StreamingLinear, Special, nn.Linear, nn.Embedding]
    assert model[0].weight is model[3].weight is shared
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_packed_model_streams(tied, tmp_path, monkeypatch):
    dense_folder, packed = converted("llama", tmp_path, tie_word_embeddings=tied)
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "packed")
    model = load(packed)
    assert type(model.lm_head) is StreamingLinear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "dense")
    plain = load(packed)
    assert type(plain.lm_head) is nn.Linear
    x = tiny.ids(1)[:, :3]
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, load(dense_folder)(x).logits, rtol=0.05, atol=0.05)
