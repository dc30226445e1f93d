"""DSnoT against a plain form of the published steps, row by row, and what its guards promise."""

from __future__ import annotations

import pytest
import torch

from sparsekit.contracts import LinearInfo, Pruned
from sparsekit.errors import PlanError
from sparsekit.masks import select, zeroed
from sparsekit.pattern import NM, Block, Unstructured
from sparsekit.refine.dsnot import DSnoT, DSnoTOptions, _Swaps
from sparsekit.solve.masked_lstsq import row_errors
from sparsekit.stats.gram import Gram
from sparsekit.stats.moments import Moments
from sparsekit.stats.sumsq import SumSq

OUT, IN = 80, 96
INFO = LinearInfo("l", 0, OUT, IN)
PATTERNS = [Unstructured(), NM(2, 4), NM(16, 32)]


def problem(seed=0, pattern=None, score="magnitude"):
    """A weight, inputs whose means matter, their statistics and a mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    x = torch.randn(400, IN, generator=generator) * torch.logspace(-1, 1, IN) + torch.randn(IN, generator=generator)
    stats = statistics(x)
    value = weight.abs() * x.norm(dim=0) if score == "wanda" else weight.abs()
    keep = select(value, pattern or Unstructured(), OUT * IN // 2, "row")
    return weight, x, stats, Pruned(zeroed(weight, keep), keep)


def statistics(x, *pieces):
    stats = {"gram": Gram(IN), "moments": Moments(IN), "sumsq": SumSq(IN)}
    for piece in x.split(list(pieces) or [len(x)]):
        for stat in stats.values():
            stat.update(piece)
    return stats


def refined(weight, start, pattern, stats, **options):
    return DSnoT(DSnoTOptions(**options), 0).refine(INFO, weight, start, pattern, stats)


def bias(weight, keep, stats):
    """E of each row, [out] float64."""
    return (weight.double() * ~keep) @ stats["moments"].mean


def by_the_book(weight, keep, stats, pattern, *, paper, cycles):
    """The published steps for one weight after the other; the default's extra rules where not `paper`."""
    mean, variance, norm = stats["moments"].mean, stats["moments"].variance, stats["sumsq"].norm()
    keep = keep.clone()
    for i in range(OUT):
        added = weight[i].double() * mean
        error = float(added[~keep[i]].sum())
        stop = 0.1 / 2048 if paper else 0.02 * abs(error)
        moved: set[int] = set()
        for _ in range(cycles):
            if abs(error) <= stop:
                break
            sign = 1 if error > 0 else -1
            pool = [j for j in range(IN) if not keep[i, j] and j not in moved]
            grown = max(pool, key=lambda j: sign * added[j] / variance[j], default=None)
            if grown is None or (not paper and sign * added[grown] <= 0):
                break
            kept = [j for j in range(IN) if keep[i, j] and j not in moved]
            if isinstance(pattern, NM):
                kept = [j for j in kept if j // pattern.of == grown // pattern.of]
            else:
                kept = [j for j in kept if sign * added[j] < 0]
            if not kept and isinstance(pattern, Unstructured):
                break
            if kept:
                lost = min(kept, key=lambda j: weight[i, j].abs() * norm[j])
                after = error - float(added[grown]) + float(added[lost])
                if after * error < 0 and not (paper and isinstance(pattern, Unstructured)):
                    break
                if paper or abs(after) < abs(error):
                    keep[i, grown], keep[i, lost], error = True, False, after
                    moved.add(lost)
            moved.add(grown)
    return keep


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_equals_the_published_steps(pattern, paper, score):
    weight, _, stats, start = problem(pattern=pattern, score=score)
    got = refined(weight, start, pattern, stats, paper=paper, guard=False, cycles=8)
    expected = by_the_book(weight, start.keep, stats, pattern, paper=paper, cycles=8)
    assert not torch.equal(expected, start.keep)
    assert float((got.keep != expected).float().mean()) < 2e-4  # float32 may order nearly equal scores otherwise


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_counts_stay_in_every_row_and_group_and_no_error_rises(pattern, seed):
    weight, _, stats, start = problem(seed, pattern)
    got = refined(weight, start, pattern, stats)
    assert torch.equal(got.keep.sum(dim=1), start.keep.sum(dim=1))
    if isinstance(pattern, NM):
        assert bool((got.keep.reshape(-1, pattern.of).sum(dim=1) == pattern.keep).all())
    assert torch.equal(got.weight, zeroed(weight, got.keep))
    gram = stats["gram"].matrix
    before, after = row_errors(weight, start.weight, gram), row_errors(weight, got.weight, gram)
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.999 * float(before.sum())
    assert bool((bias(weight, got.keep, stats).abs() <= bias(weight, start.keep, stats).abs()).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_swap_of_the_default_lowers_the_expected_error(pattern):
    weight, _, stats, start = problem(pattern=pattern)
    added = weight * stats["moments"].mean.float()
    keep = start.keep.clone()
    swaps = _Swaps(added, added / stats["moments"].variance.float(), weight.abs() * stats["sumsq"].norm(), keep)
    most = 0
    while True:
        before, errors = keep.clone(), bias(weight, keep, stats).abs()
        going = swaps.cycle(pattern.of if isinstance(pattern, NM) else None, False)
        changed = (keep ^ before).sum(dim=1)
        assert set(changed.tolist()) <= {0, 2}
        after = bias(weight, keep, stats).abs()
        assert bool((after[changed > 0] < errors[changed > 0]).all())
        torch.testing.assert_close(after, swaps.error.abs(), rtol=1e-4, atol=1e-3)
        most += int(changed.max()) // 2
        if not going:
            break
    assert most >= 3
    assert float(after.mean()) < 0.34 * float(bias(weight, start.keep, stats).abs().mean())


def test_the_guard_takes_rows_back_whose_true_error_would_rise():
    weight, _, stats, start = problem(score="wanda")
    gram = stats["gram"].matrix
    free = refined(weight, start, Unstructured(), stats, guard=False)
    guarded = refined(weight, start, Unstructured(), stats, guard=True)
    worse = row_errors(weight, free.weight, gram) > row_errors(weight, start.weight, gram)
    assert 0 < int(worse.sum()) < OUT
    assert torch.equal(guarded.keep, torch.where(worse[:, None], start.keep, free.keep))


@pytest.mark.parametrize("paper", [False, True])
def test_nothing_removed_or_no_cycle_is_nothing_changed(paper):
    weight, _, stats, start = problem()
    whole = torch.ones(OUT, IN, dtype=torch.bool)
    for keep in (whole, ~whole):
        got = refined(weight, Pruned(zeroed(weight, keep), keep), Unstructured(), stats, paper=paper)
        assert torch.equal(got.keep, keep)
    assert torch.equal(refined(weight, start, Unstructured(), stats, paper=paper, cycles=0).keep, start.keep)


def test_the_split_of_the_text_does_not_matter():
    weight, x, stats, start = problem()
    parts = statistics(x, 1, 99, 300)
    one = refined(weight, start, Unstructured(), stats)
    two = refined(weight, start, Unstructured(), parts)
    assert torch.equal(one.keep, two.keep)


def test_channels_without_variance_or_input_are_harmless():
    weight, x, _, start = problem()
    x[:, :5] = 0
    x[:, 5:10] = 3
    stats = statistics(x)
    got = refined(weight, start, Unstructured(), stats)
    gram = stats["gram"].matrix
    assert bool((row_errors(weight, got.weight, gram) <= row_errors(weight, start.weight, gram)).all())
    got = refined(weight, start, Unstructured(), statistics(x * 0))
    assert torch.equal(got.keep, start.keep)


def test_blocks_are_refused_before_anything_is_read():
    with pytest.raises(PlanError, match=r"pattern 4x1 does not allow. Use unstructured"):
        DSnoT(DSnoTOptions(), 0).check(Block(4, 1))
