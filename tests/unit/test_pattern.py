from __future__ import annotations

import pytest

from sparsekit.errors import PlanError, RecipeSchemaError
from sparsekit.pattern import NM, Block, Unstructured, parse_pattern


def test_nm_counts_the_kept():
    assert parse_pattern("1:4") == NM(keep=1, of=4)
    assert parse_pattern("1:4").sparsity == 0.75
    assert parse_pattern("2:4").sparsity == 0.5


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "1:4", "32:64", "4x1", "16x16"])
def test_patterns_print_as_they_are_written(text):
    assert str(parse_pattern(text)) == text


@pytest.mark.parametrize("text", ["", "2;4", "5:4", "0:4", "2:", "4x", "0x4", "2:4:8", "structured", " 2:4"])
def test_what_is_not_a_pattern_is_refused(text):
    with pytest.raises(RecipeSchemaError):
        parse_pattern(text)


def test_width_not_divisible_names_the_linear_and_the_numbers():
    with pytest.raises(PlanError, match=r"layer\.q: pattern 2:5 needs an input width divisible by 5, got 576"):
        NM(2, 5).check(8, 576, where="layer.q")
    with pytest.raises(PlanError, match=r"blocks of 3x2 do not tile a weight of 8 x 6"):
        Block(3, 2).check(8, 6, where="layer.q")
    Unstructured().check(7, 13, where="layer.q")
