"""Selection: exact counts, ties by index, legal patterns; against a brute force that sorts."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from sparsekit import masks
from sparsekit.errors import NonFinite, PatternViolation, PlanError, ShapeMismatch, WeightMismatch
from sparsekit.pattern import NM, Block, Unstructured

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 24))


@st.composite
def scores(draw, shapes=SHAPES):
    """Scores with many ties: weights of quantised files tie massively."""
    rows, columns = draw(shapes)
    levels = draw(st.sampled_from([2, 5, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, levels, (rows, columns), generator=generator).float() / 7


def brute_force(values: list[float], count: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = set(order[:count])
    return [i in kept for i in range(len(values))]


@given(scores(), st.floats(0, 1))
def test_linear_selection_equals_a_stable_sort(score, share):
    budget = round(share * score.numel())
    keep = masks.select(score, Unstructured(), budget, "linear")
    assert keep.reshape(-1).tolist() == brute_force(score.reshape(-1).tolist(), budget)


@given(scores(), st.floats(0, 1))
def test_row_selection_is_exact_and_even(score, share):
    budget = round(share * score.numel())
    keep = masks.select(score, Unstructured(), budget, "row")
    assert int(keep.sum()) == budget
    base, remainder = divmod(budget, score.shape[0])
    next_scores = []
    for row, mask in zip(score.tolist(), keep.tolist(), strict=True):
        assert sum(mask) in (base, base + 1)
        assert mask == brute_force(row, sum(mask))
        next_scores.append(sorted(row, reverse=True)[base] if base < len(row) else float("-inf"))
    lucky = [sum(mask) == base + 1 for mask in keep.tolist()]
    if remainder:
        assert lucky == brute_force(next_scores, remainder)


@given(
    scores(st.tuples(st.integers(1, 6), st.integers(1, 4).map(lambda n: n * 8))),
    st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 8), (8, 8)]),
)
def test_nm_keeps_the_best_of_each_group(score, ratio):
    pattern = NM(*ratio)
    budget = score.numel() // pattern.of * pattern.keep
    keep = masks.select(score, pattern, budget, "row")
    for values, mask in zip(score.reshape(-1, pattern.of).tolist(), keep.reshape(-1, pattern.of).tolist(), strict=True):
        assert mask == brute_force(values, pattern.keep)


@given(
    scores(st.tuples(st.integers(1, 3).map(lambda n: n * 4), st.integers(1, 4).map(lambda n: n * 2))),
    st.floats(0, 1),
    st.sampled_from(["row", "linear"]),
)
def test_blocks_are_whole_and_the_best(score, share, group):
    pattern = Block(4, 2)
    blocks = score.numel() // 8
    budget = round(share * blocks) * 8
    keep = masks.select(score, pattern, budget, group)
    tiles = keep.reshape(score.shape[0] // 4, 4, -1, 2).sum(dim=(1, 3))
    assert set(tiles.reshape(-1).tolist()) <= {0, 8}
    assert int(keep.sum()) == budget
    if group == "linear":
        energy = score.square().reshape(score.shape[0] // 4, 4, -1, 2).sum(dim=(1, 3)).reshape(-1)
        assert (tiles.reshape(-1) == 8).tolist() == brute_force(energy.tolist(), budget // 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    score = torch.ones(4, 8)
    score[2, 3] = bad
    with pytest.raises(NonFinite, match="1 of 32 scores"):
        masks.select(score, Unstructured(), 16, "row")


def test_impossible_budgets_are_refused():
    with pytest.raises(PlanError):
        masks.select(torch.ones(4, 8), Unstructured(), 33, "row")
    with pytest.raises(PlanError):
        masks.select(torch.ones(4, 8), NM(2, 4), 15, "row")
    with pytest.raises(PlanError):
        masks.select(torch.ones(4, 8), Block(2, 2), 15, "row")


def test_check_sees_each_kind_of_disagreement():
    weight = torch.ones(2, 8)
    keep = masks.select(weight, NM(2, 4), 8, "row")
    pruned = weight.masked_fill(~keep, 0)
    masks.check(pruned, keep, NM(2, 4), 8, where="x")
    with pytest.raises(WeightMismatch, match="x: 8 weights kept, budget 9"):
        masks.check(pruned, keep, NM(2, 4), 9, where="x")
    with pytest.raises(WeightMismatch, match="8 removed weights are not zero"):
        masks.check(weight, keep, NM(2, 4), 8, where="x")
    moved = torch.tensor([[True] * 4 + [False] * 4] * 2)
    with pytest.raises(PatternViolation, match="groups do not keep exactly 2:4"):
        masks.check(weight.masked_fill(~moved, 0), moved, NM(2, 4), 8, where="x")
    with pytest.raises(PatternViolation, match="kept in part"):
        masks.check(pruned, keep, Block(2, 8), 8, where="x")
    with pytest.raises(ShapeMismatch):
        masks.check(pruned, keep[:, :4], NM(2, 4), 8, where="x")
    with pytest.raises(NonFinite):
        masks.check(pruned / 0, keep, NM(2, 4), 8, where="x")


def test_a_kept_weight_may_be_zero():
    weight = torch.zeros(2, 4)
    keep = masks.select(weight, Unstructured(), 4, "row")
    masks.check(weight, keep, Unstructured(), 4, where="x")
    assert keep.tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_removed_weights_are_positive_zeros_and_kept_ones_keep_their_bits(dtype):
    weight = torch.tensor([[-0.0, -1.5], [-2.5, 3.0]], dtype=dtype)
    pruned = masks.ranked(weight, torch.tensor([[2.0, 1.0], [1.0, 2.0]]), "row")(Unstructured(), 2)
    assert pruned.weight.tolist() == [[0.0, 0.0], [0.0, 3.0]]
    assert pruned.weight.signbit().tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_the_chunks_of_the_ranking_do_not_matter(chunk, monkeypatch):
    score = torch.randint(0, 9, (13, 10), generator=torch.Generator().manual_seed(0)).float()
    monkeypatch.setattr(masks, "_PARTITION_ELEMENTS", chunk)
    keep = masks.select(score, Unstructured(), 13 * 4, "row")
    assert [row.tolist() for row in keep] == [brute_force(row.tolist(), 4) for row in score]
