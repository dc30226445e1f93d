"""The level database: every level comes back exactly, in a byte per weight where it can."""

from __future__ import annotations

import pytest
import torch

from sparsekit import registry
from sparsekit.contracts import LinearInfo, Pruned
from sparsekit.errors import ChecksumError, Locked, ResumeMismatch, SparsekitError
from sparsekit.pattern import Block, Unstructured
from sparsekit.search.grid import make_grid
from sparsekit.search.levels import LevelDatabase

A, B = LinearInfo("model.layers.0.up", 0, 24, 40), LinearInfo("model.layers.0.down", 0, 40, 24)
IDENTITY = {"model": {"sha256": "ab"}, "calibration": "cd", "recipe": {"sparsity": 0.5}}
NESTED = [name for name in registry.names("pruners") if registry.load("pruners", name).nested]
FITTED = ["random", "magnitude", "wanda", "ria", "sparsegpt", "alps"]


def weight(linear, seed=0):
    return torch.randn(linear.out_features, linear.in_features, generator=torch.Generator().manual_seed(seed))


def grid(unit=1, levels=4):
    return make_grid([A, B], 960, unit, levels=levels, span=0.5)


def fit(name, linear):
    pruner = registry.load("pruners", name)
    method = pruner(pruner.options_type(), 0)
    stats = {need: registry.load("stats", need)(linear.in_features) for need in method.needs}
    for stat in stats.values():
        stat.update(torch.randn(400, linear.in_features, generator=torch.Generator().manual_seed(3)).exp())
    return method, method.fit(linear, weight(linear), stats)


def add(database, linear, name="wanda", pattern=None, dtype=torch.float32):
    method, at = fit(name, linear)
    parts = database.parts(linear, weight(linear), at, pattern or Unstructured(), nested=method.nested, dtype=dtype)
    database.keep(linear, parts)
    return at


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 2)], ids=str)
def test_every_level_comes_back_exactly(tmp_path, name, pattern):
    with LevelDatabase(tmp_path, IDENTITY, grid(pattern.unit)) as database:
        at = add(database, A, name, pattern)
        for level in database.grid.levels(A.name):
            expected = at(pattern, database.grid.count(A.name, level)).weight
            assert torch.equal(database.weight(A, weight(A), level), expected)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_values_are_those_of_the_models_dtype(tmp_path, name):
    with LevelDatabase(tmp_path, IDENTITY, grid()) as database:
        at = add(database, A, name, dtype=torch.bfloat16)
        dense = weight(A).bfloat16()
        found = database.weight(A, dense, -2)
    assert found.dtype == torch.bfloat16
    expected = at(Unstructured(), database.grid.count(A.name, -2))
    assert torch.equal(found != 0, expected.keep & (expected.weight.bfloat16() != 0))
    if name == "sparsegpt":
        assert torch.equal(found, expected.weight.bfloat16())


def test_nested_levels_take_a_byte_per_weight(tmp_path):
    with LevelDatabase(tmp_path, IDENTITY, grid()) as database:
        add(database, A)
        assert database.expected_bytes([A], nested=True, dtype=torch.float32) == A.numel
        assert A.numel < database.nbytes() < A.numel + 300


def test_separate_levels_take_what_was_announced(tmp_path):
    with LevelDatabase(tmp_path, IDENTITY, grid()) as database:
        add(database, A, "sparsegpt", dtype=torch.bfloat16)
        announced = database.expected_bytes([A], nested=False, dtype=torch.bfloat16)
        assert announced < database.nbytes() < announced + 3000


def test_those_who_say_so_are_nested():
    assert set(NESTED) == {"random", "magnitude", "wanda", "ria"}


def test_a_pruner_that_is_not_nested_though_it_says_so_is_found_out(tmp_path):
    def at(pattern, count):
        keep = torch.zeros(A.numel, dtype=torch.bool)
        keep[count % 7 : count % 7 + count] = True
        keep = keep.reshape(24, 40)
        return Pruned(weight(A) * keep, keep)

    with (
        LevelDatabase(tmp_path, IDENTITY, grid()) as database,
        pytest.raises(SparsekitError, match=r"layers\.0\.up: .*is not nested"),
    ):
        database.parts(A, weight(A), at, Unstructured(), nested=True, dtype=torch.float32)


def test_what_is_there_is_not_built_again(tmp_path):
    with LevelDatabase(tmp_path, IDENTITY, grid()) as database:
        add(database, A)
        assert database.missing([A, B]) == [B]
    with LevelDatabase(tmp_path, IDENTITY, grid()) as again:
        assert again.missing([A, B]) == [B]
        add(again, B)
        assert again.missing([A, B]) == []
        assert torch.equal(again.weight(A, weight(A), 0), fit("wanda", A)[1](Unstructured(), 480).weight)


def test_a_killed_write_leaves_nothing_that_counts(tmp_path):
    with LevelDatabase(tmp_path, IDENTITY, grid()) as database:
        add(database, A)
    (tmp_path / "draft.safetensors").write_bytes(b"half of a fi")
    journal = tmp_path / "levels.journal"
    journal.write_bytes(journal.read_bytes() + b'torn {"key": ')
    with LevelDatabase(tmp_path, IDENTITY, grid()) as again:
        assert again.missing([A, B]) == [B]
        add(again, B)
    with LevelDatabase(tmp_path, IDENTITY, grid()) as last:
        assert last.missing([A, B]) == []


def test_damage_is_named_and_deleting_the_file_builds_it_again(tmp_path):
    with LevelDatabase(tmp_path, IDENTITY, grid()) as database:
        add(database, A)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with LevelDatabase(tmp_path, IDENTITY, grid()) as again:
        with pytest.raises(ChecksumError, match=r"levels of model\.layers\.0\.up") as caught:
            again.weight(A, weight(A), 0)
        assert str(file) in str(caught.value)
        assert "Delete that file" in str(caught.value)
        file.unlink()
        assert again.missing([A]) == [A]
        add(again, A)
        assert again.weight(A, weight(A), 0).count_nonzero() == 480


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"sha256": "ff"}}, r'model\.sha256: "ab" -> "ff"'),
        ({"calibration": "ee"}, 'calibration: "cd" -> "ee"'),
        ({"recipe": {"sparsity": 0.7}}, r"recipe\.sparsity: 0\.5 -> 0\.7"),
    ],
)
def test_the_database_of_something_else_is_refused_by_what_differs(tmp_path, change, message):
    with LevelDatabase(tmp_path, IDENTITY, grid()) as database:
        add(database, A)
    with pytest.raises(ResumeMismatch, match=message):
        LevelDatabase(tmp_path, {**IDENTITY, **change}, grid())
    with pytest.raises(ResumeMismatch, match=r"levels\.step"):
        LevelDatabase(tmp_path, IDENTITY, grid(levels=8))
    with LevelDatabase(tmp_path, IDENTITY, grid()) as same:  # the refusals have let go of the lock
        assert same.missing([A]) == []


def test_one_process_at_a_time(tmp_path):
    with LevelDatabase(tmp_path, IDENTITY, grid()), pytest.raises(Locked):
        LevelDatabase(tmp_path, IDENTITY, grid())


def test_a_level_may_keep_nothing(tmp_path):
    nothing = make_grid([A, B], 6, 1, levels=4, span=0.5)
    assert nothing.count(A.name, nothing.lowest[A.name]) == 0
    with LevelDatabase(tmp_path, IDENTITY, nothing) as database:
        add(database, A, "sparsegpt", dtype=torch.bfloat16)
        assert not database.weight(A, weight(A).bfloat16(), nothing.lowest[A.name]).any()
