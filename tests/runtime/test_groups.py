"""Layers that share an input are computed in one call, and nothing can tell but the clock."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from sparsekit.runtime import groups, ops
from sparsekit.runtime.modules import SparseLinear
from tests.runtime.support import converted, load
from tests.support import tiny


def layer(rows=40, cols=48, bias=False, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    plain = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    weight = plain.weight.detach() * (torch.rand(rows, cols) > 0.5)
    made = SparseLinear(plain)
    made.weight = weight
    return made


class Attention(nn.Module):
    """Three layers of different sizes that are called one after the other."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = layer(40), layer(24, bias=True, seed=1), layer(17, seed=2)
        self.o = layer(8, 40, seed=3)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q), k, v


@pytest.fixture
def counted(monkeypatch):
    """Sizes of the groups that were computed."""
    sizes, kernel = [], ops.linear_group

    def count(x, *members):
        sizes.append(len(members) // 3)
        return kernel(x, *members)

    monkeypatch.setattr(ops, "linear_group", count)
    return sizes


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def alone(made, x):
    """The product by the operator, past everything that is remembered."""
    return ops.linear(x, made.packed, made.bias, made.out_features)


def check(model, x):
    """Call the model and compare with the products one by one, bit by bit."""
    o, k, v = model(x)
    q = alone(model.q, x)
    for got, expected in ((o, alone(model.o, q)), (k, alone(model.k, x)), (v, alone(model.v, x))):
        assert torch.equal(got, expected)
        assert got.is_contiguous()


def x_of(*shape):
    return torch.randn(*shape, 48).bfloat16()


def test_siblings_become_one_call(counted):
    model = Attention()
    for shape in [(1, 1), (4, 1), (2, 5), (16,), (), (0,)]:
        check(model, x_of(*shape))
    assert counted == [3] * 5
    check(model, x_of(17))  # many tokens: one by one
    assert counted == [3] * 5
    assert [len(each.followers) for each in (model.q, model.k, model.v, model.o)] == [2, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_inputs_than_weights(dtype, counted):
    model = Attention()
    model.k.bias = None
    for _ in range(3):
        check(model, x_of(2).to(dtype))
    assert counted == [3, 3]


def test_five_of_one_input_are_two_groups(counted):
    layers = [layer(seed=seed) for seed in range(5)]
    for _ in range(3):
        x = x_of(1)
        assert all(torch.equal(made(x), alone(made, x)) for made in layers)
    assert counted == [3, 2, 3, 2]


def test_a_wrong_guess_costs_one_group(counted):
    first, second, third = (layer(seed=seed) for seed in range(3))
    for order in [(first, second), (first, third), (first, second), (first, second)]:
        x = x_of(1)
        assert all(torch.equal(made(x), alone(made, x)) for made in order)
    assert counted == [2]
    assert first.followers is None


def test_input_written_between_the_calls(counted):
    model = Attention()
    check(model, x_of(1))
    x = x_of(1)
    model.q(x)
    x.add_(1)
    assert torch.equal(model.k(x), alone(model.k, x))
    assert counted == [3]


def test_weight_and_bias_exchanged_between_the_calls(counted):
    for change in ("weight", "bias"):
        model = Attention()
        check(model, x_of(1))
        x = x_of(1)
        model.q(x)
        value = torch.ones(24, 48) if change == "weight" else nn.Parameter(torch.ones(24))
        setattr(model.k, change, value.bfloat16() if change == "weight" else nn.Parameter(value.bfloat16()))
        assert torch.equal(model.k(x), alone(model.k, x))
    assert counted == [3, 3]


def test_a_follower_that_does_not_fit_fails_in_its_own_call(counted):
    model = Attention()
    check(model, x_of(1))
    model.v = layer(17, 48)  # the old one is gone: learn again
    gc.collect()
    check(model, x_of(1))
    check(model, x_of(1))
    model.q.followers = (weakref.ref(model.o),)
    x = x_of(1)
    assert torch.equal(model.q(x), alone(model.q, x))
    with pytest.raises(RuntimeError):
        model.o(x)
    assert counted == [3, 2]


def test_nothing_is_kept_alive(counted):
    model = Attention()
    check(model, x_of(1))
    x = x_of(1)
    seen = weakref.ref(x)
    model.q(x)  # and no more: the products of k and v wait
    results = [weakref.ref(left[3]) for left in groups._calls.left]
    assert len(results) == 2
    del x
    gc.collect()
    assert seen() is None
    other = layer()
    other(x_of(1))
    gc.collect()
    assert [result() for result in results] == [None, None]
    model_seen = weakref.ref(model.q)
    del model
    gc.collect()
    assert model_seen() is None


def test_an_exception_between_the_calls(counted):
    model = Attention()
    check(model, x_of(1))
    hook = model.k.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x_of(1))
    hook.remove()
    for _ in range(2):
        check(model, x_of(1))


def test_hooks_run_and_may_change_the_input(counted):
    model = Attention()
    check(model, x_of(1))
    x = x_of(1)
    model.k.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    model.v.register_forward_hook(lambda _module, _inputs, output: output + 1)
    _, k, v = model(x)
    assert torch.equal(k, alone(model.k, x * 2))
    assert torch.equal(v, alone(model.v, x) + 1)


def test_copies_and_pickles_learn_anew(counted):
    model = Attention()
    check(model, x_of(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q.followers == ()
        check(other, x_of(1))
        assert [reference() for reference in other.q.followers] == [other.k, other.v]
        check(other, x_of(1))
    assert counted == [3, 3]


def test_threads_have_their_own_calls():
    model, wrong = Attention(), []

    def work():
        with torch.no_grad():
            for _ in range(200):
                x = x_of(1)
                o, k, v = model(x)
                good = torch.equal(k, alone(model.k, x)) and torch.equal(v, alone(model.v, x))
                if not (good and torch.equal(o, alone(model.o, alone(model.q, x)))):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_off_with_gradients_inference_mode_and_compile(counted):
    model = Attention()
    check(model, x_of(1))
    with torch.enable_grad():
        x = x_of(1).requires_grad_()
        (model(x)[1].sum() + model(x)[2].sum()).backward()
        assert x.grad is not None
    with torch.inference_mode():
        check(model, x_of(1))
    x = x_of(1)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = len(counted)
    for got, wanted in zip(compiled(x), expected, strict=True):
        assert torch.equal(got, wanted)
    assert len(counted) == before == 1


def test_a_packed_model_groups_and_generates_the_same(tmp_path, monkeypatch, counted):
    _, packed = converted("llama", tmp_path)
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "packed")
    model = load(packed)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(tiny.ids(1)[:, :2], **options)
    assert set(counted) == {2, 3}
    monkeypatch.setattr(groups, "groupable", lambda *_: False)
    counted.clear()
    assert torch.equal(model.generate(tiny.ids(1)[:, :2], **options), together)
    assert not counted
