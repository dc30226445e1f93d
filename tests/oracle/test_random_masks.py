"""The expected error of a random mask against the mean over every mask there is."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from sparsekit.layer_errors import layer_errors
from sparsekit.pattern import NM, Block, Unstructured
from sparsekit.stats.gram import Gram
from sparsekit.stats.sumsq import SumSq

OUT, IN = 2, 6


def statistics(kind):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, IN, generator=generator) @ torch.randn(IN, IN, generator=generator) + 1
    stat = kind(IN)
    stat.update(x)
    return {kind.__name__.lower(): stat}, x.double()


def choices(units, kept):
    """Every way to keep `kept` of `units`, as rows of a mask."""
    for chosen in combinations(range(units), kept):
        mask = torch.zeros(units, dtype=torch.bool)
        mask[list(chosen)] = True
        yield mask


def all_masks(pattern, kept):
    if isinstance(pattern, NM):
        groups = OUT * IN // pattern.of
        for parts in product(list(choices(pattern.of, pattern.keep)), repeat=groups):
            yield torch.stack(parts).reshape(OUT, IN)
    elif isinstance(pattern, Block):
        tiles = (OUT // pattern.rows, IN // pattern.cols)
        for mask in choices(tiles[0] * tiles[1], kept // pattern.unit):
            yield mask.reshape(tiles).repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    else:
        yield from (mask.reshape(OUT, IN) for mask in choices(OUT * IN, kept))


CASES = [
    (Unstructured(), 0), (Unstructured(), 1), (Unstructured(), 5), (Unstructured(), 11), (Unstructured(), 12),
    (NM(1, 3), 4), (NM(2, 3), 8), (NM(1, 2), 6), (NM(2, 6), 4), (NM(3, 3), 12),
    (Block(1, 2), 4), (Block(2, 1), 6), (Block(2, 2), 4), (Block(1, 3), 9), (Block(2, 6), 0),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "kept"), CASES, ids=str)
def test_with_a_gram_matrix(pattern, kept):
    stats, x = statistics(Gram)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    dense = weight.double()
    whole = (x @ dense.T).square().sum()
    masks = list(all_masks(pattern, kept))
    assert all(int(mask.sum()) == kept for mask in masks)
    outputs = [float((x @ (dense * ~mask).T).square().sum() / whole) for mask in masks]
    weights = [float((dense * ~mask).square().sum() / dense.square().sum()) for mask in masks]
    _, null = layer_errors(weight, weight, stats, pattern, kept)
    assert null["output_error"] == pytest.approx(sum(outputs) / len(masks), rel=1e-5, abs=1e-9)
    assert null["weight_error"] == pytest.approx(sum(weights) / len(masks), rel=1e-5, abs=1e-9)


def test_with_norms_it_is_the_sparsity():
    stats, _ = statistics(SumSq)
    weight = torch.randn(OUT, IN)
    errors, null = layer_errors(weight, weight, stats, NM(1, 3), 4)
    assert null == pytest.approx({"weight_error": 2 / 3, "output_error_diagonal": 2 / 3})
    assert errors == {"weight_error": 0, "output_error_diagonal": 0}


def test_a_linear_of_zeros_has_no_error():
    stats, _ = statistics(Gram)
    weight = torch.zeros(OUT, IN)
    assert layer_errors(weight, weight, stats, Unstructured(), 6)[1] == {"weight_error": 0, "output_error": 0}
