"""The parts that the pages are made of: sums, numbers, paths, axes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.report import card, charts, text
from sparsekit.report.summary import summarise


def stage(coverage=1.0, **kept):
    linears = {
        name.replace("__", "."): {"kept": value, "numel": 100, "weight_error": value / 1000}
        for name, value in kept.items()
    }
    return {"numel": 100 * len(linears), "coverage": coverage, "linears": linears}


# --- sums --------------------------------------------------------------------------------------------------
def test_stages_on_different_linears_add_up():
    one = stage(0.5, model__layers__0__a=50, model__layers__1__a=50)
    two = stage(0.5, model__layers__0__b=100, model__layers__1__b=0)
    summary = summarise({"stages": [one, two]})
    assert summary.sparsity == 0.5
    assert summary.coverage == 1.0
    assert summary.with_zeros == 3
    assert {block: group.sparsity for block, group in summary.by_block().items()} == {0: 0.25, 1: 0.75}
    assert list(summary.by_kind()) == ["a", "b"]


def test_a_later_denser_stage_brings_no_weight_back():
    summary = summarise({"stages": [stage(model__layers__0__a=30), stage(model__layers__0__a=70)]})
    assert summary.sparsity == 0.7


def test_errors_are_weighted_by_size():
    linears = {
        "h.0.a": {"kept": 1, "numel": 300, "weight_error": 0.1, "output_error_diagonal": 0.4},
        "h.0.b": {"kept": 1, "numel": 100, "weight_error": 0.5},
    }
    group = summarise({"stages": [{"numel": 400, "coverage": 1.0, "linears": linears}]}).by_block()[0]
    assert group.mean("weight_error") == pytest.approx(0.2)
    assert group.mean("output_error") == pytest.approx(0.4)
    assert group.range("weight_error") == (0.1, 0.5)


# --- numbers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [(32.712, 1.234, "32.7 ± 1.2"), (0.63961, 0.0123, "0.640 ± 0.012"), (5.0, None, "5.000"), (None, 1.0, "-"),
     (math.inf, math.nan, "inf"), (123456.0, 789.0, "1.23e+05 ± 789.0"), (1.5, 0.0, "1.500")],
)  # fmt: skip
def test_an_error_has_two_digits_and_its_value_no_more(value, stderr, shown):
    assert text.with_error(value, stderr) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(1.0, "100.0 %"), (0.99999, "> 99.9 %"), (0.5, "50.0 %"), (0.00001, "< 0.1 %"), (0.0, "0.0 %")],
)
def test_all_and_nothing_are_only_said_when_true(share, shown):
    assert text.percent(share) == shown


@given(st.floats(1e-9, 1e9))
def test_an_axis_reaches_the_highest_value_in_few_even_steps(highest):
    ticks = charts.axis(highest)
    assert ticks[0] == 0
    assert highest <= ticks[-1] * (1 + 1e-6)
    assert 2 <= len(ticks) <= 7
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), abs=2e-12)


@given(
    st.lists(st.tuples(st.integers(0, 100), st.floats(0, 2)), min_size=1, max_size=40),
    st.sampled_from(["sparsity", "weight_error"]),
)
def test_charts_stay_inside_their_frame(values, measure):
    linears = {
        f"h.{i // 3}.k{i % 3}": {"kept": kept, "numel": 100, "weight_error": error}
        for i, (kept, error) in enumerate(values)
    }
    summary = summarise({"stages": [{"numel": 100 * len(values), "coverage": 1.0, "linears": linears}]})
    heat = charts.heat_map(summary, measure)
    assert len(heat.cells) == len(values)
    assert all(0 <= c.strength <= 1 for c in heat.cells)
    assert all(c.width > 0 and c.x + c.width <= charts.WIDTH and c.y + c.height <= heat.height for c in heat.cells)
    line = charts.line_chart(summary, measure)
    places = [tuple(map(float, pair.split(","))) for pair in (line.line + " " + line.band).split()]
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= line.height for x, y in places)


def test_an_unknown_measure_has_no_chart():
    summary = summarise({"stages": [stage(model__layers__0__a=30)]})
    assert charts.heat_map(summary, "output_error") is None
    assert charts.line_chart(summary, "output_error") is None


# --- paths and Markdown ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        ("/home/me/My Models/llama", "llama"),
        ("/home/me/llama/", "llama"),
        ("~/llama", "llama"),
        ("../x/llama", "llama"),
        (r"C:\Users\me\llama", "llama"),
        (r"\\server\share\llama", "llama"),
        ("text /home/me/a.jsonl, field text", "text a.jsonl, field text"),
        ("see file:///home/me/a.jsonl.", "see a.jsonl."),
        ("https://huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("org/model", "org/model"),
        ("3 tokens/s and 1/2", "3 tokens/s and 1/2"),
        (r"re:.*\.layers\.(0|1)\..*", r"re:.*\.layers\.(0|1)\..*"),
        ("*.q_proj", "*.q_proj"),
        ("data/*/part.jsonl", "data/*/part.jsonl"),
    ],
)
def test_paths_are_shortened_and_the_rest_left_alone(given_, shown):
    assert text.Scrubber({}).text(given_) == shown


def test_words_of_a_command_keep_their_keys():
    scrubber = text.Scrubber({"models/mine": "mine"})
    words = ["models/mine", "--out=/srv/a b/c", "calibration.source=/d/e.jsonl", "stages.0.sparsity=0.6", "-o", "/x/y"]
    assert [scrubber.argument(word) for word in words] == [
        "mine", "--out=c", "calibration.source=e.jsonl", "stages.0.sparsity=0.6", "-o", "y",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["org/model", "gpt2", "meta-llama/Llama-3.2-1B"])
def test_hub_ids(name):
    assert text.is_hub_id(name)


@pytest.mark.parametrize("name", ["/srv/model", "./model", "a/b/c", "a b", "a/../b", "", "C:\\x"])
def test_no_hub_ids(name):
    assert not text.is_hub_id(name)


def test_a_fence_is_longer_than_any_in_its_text():
    assert card.fenced("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"


def test_inline_code_survives_backticks():
    assert card.code("a`b") == "`` a`b ``"
    assert card.code("a_b*c") == "`a_b*c`"


def test_escaped_text_is_one_plain_line():
    assert card.escape("a_b *c*\n<d> [e](f) | `g` _h_") == r"a_b \*c\* &lt;d&gt; \[e\](f) \| \`g\` \_h\_"
