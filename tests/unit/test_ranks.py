"""What ranks do alone, and how work is divided among them."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import ranks
from sparsekit.errors import NumericalError
from sparsekit.ranks import Ranks, _Pickler, _Unpickler
from sparsekit.stats.gram import Gram


def test_one_process_does_what_it_is_given(tmp_path):
    value = object()
    assert ranks.share(lambda: value) is value
    assert ranks.gather(value) == [value]
    assert ranks.one_first(lambda: value) is value
    assert ranks.spread([1, 2, 3], lambda number: 2 * number) == [2, 4, 6]
    ranks.require_shared(tmp_path / "nothing is made")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NumericalError), ranks.together():
        raise NumericalError("no")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, Ranks()),
        ({"WORLD_SIZE": "4"}, Ranks()),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Ranks(1, 4, 1)),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"},
            Ranks(1, 4, 2),
        ),
        ({"RANK": "one", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Ranks()),
    ],
)
def test_the_environment_of_a_launcher_is_read(said, found, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert ranks.launched() == found
    assert ranks.here() == Ranks()


@given(st.integers(0, 50), st.integers(1, 9))
def test_portions_are_consecutive_whole_and_even(count, size):
    things, parts = list(range(count)), []
    for rank in range(size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "_here", Ranks(rank, size))
            parts.append(things[ranks.portion(count)])
    assert [thing for part in parts for thing in part] == things
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[0]) == max(map(len, parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.float64, torch.int32])
def test_tensors_stay_out_of_the_pickle(dtype):
    view = torch.ones(40, 300, dtype=dtype)[::2, 7:]
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump({"here": view, "none": torch.empty(0, 3)})
    assert len(file.getvalue()) < 1000
    unpickler = _Unpickler(io.BytesIO(file.getvalue()))
    found = unpickler.load()
    for empty, sent in zip(unpickler.tensors, pickler.tensors, strict=True):
        empty.copy_(sent)
    assert torch.equal(found["here"], view)
    assert found["none"].shape == (0, 3)


def test_a_gram_matrix_travels_without_its_lock():
    gram = Gram(3)
    gram.update(torch.randn(5, 3))
    gram.once(torch.linalg.inv)
    copy = pickle.loads(pickle.dumps(gram))
    assert torch.equal(copy.matrix, gram.matrix)
    assert copy.tokens == 5
    assert torch.equal(copy.metric, gram.metric)
