"""What the pages say of activation sparsity: figures, protocol, how to load, and no word of pruning."""

from __future__ import annotations

import copy
import re

import pytest
from huggingface_hub import ModelCard

import sparsekit
from sparsekit.report import one_line, pages
from sparsekit.report.activations import activation_panel
from sparsekit.report.text import TIMES
from sparsekit.runtime import gates
from tests.report.test_report_pages import HOSTILE, Page
from tests.support import tiny
from tests.support.gated import thin


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    sets = ("stages.0.tolerance=0.03", "stages.0.allocate=uniform")
    return thin(tiny.save("llama", folder / "model"), folder / "out", "teal-40", *sets, evaluation=True)


@pytest.fixture
def report(outcome):
    return copy.deepcopy(outcome.report)


def page(report, folder):
    return pages(report, folder)["report.html"].decode()


def visible(html):
    return " ".join(" ".join(Page(html).text).split())


def test_the_page_has_every_figure_with_its_protocol(outcome):
    html, said = (outcome.out / "report.html").read_text(), outcome.report["activations"]
    text = visible(html)
    assert f"Thinned out: {said['protocol']}" in text
    for reading in (said["held_out"], *said["other_text"].values()):
        assert f"{100 * reading['sparsity']:.1f} %" in text
        assert f"{TIMES} {reading['perplexity_ratio']:.3f}"[:5] in text
    assert "Asked for 40.0 % of the weights that can be skipped" in text
    assert "self_attn.q_proj 3 0.400" in text
    assert "Search for what the budget allows" not in text
    assert "pruned" not in text.lower()


def test_the_charts_hold_every_block_and_every_entry(outcome):
    html, said = (outcome.out / "report.html").read_text(), outcome.report["activations"]
    for block in range(3):
        assert f"<title>block {block}: mean 0." in html
        assert f"<title>block {block}: asked 0.4000" in html
    counts = [int(found.replace(",", "")) for found in re.findall(r"tokens: ([\d,]+) entries", html)]
    assert sum(counts) == sum(sum(bins) for bins in said["usage"].values())
    assert html.count("<rect ") == 20 * len(said["usage"])


def test_bars_stand_on_their_axis_inside_the_drawing(report):
    panel = activation_panel(report)
    for histogram in panel.usage:
        feet = {round(bar.y + bar.height, 1) for bar in histogram.bars}
        assert len(feet) == 1
        assert feet.pop() < histogram.left.y <= panel.usage_height
        assert all(bar.height >= 0 and bar.y > histogram.title.y for bar in histogram.bars)


def test_means_of_kinds_are_weighted_by_what_they_skip(report):
    said = report["activations"]
    total = sum(facts["numel"] for facts in said["signals"].values())
    mean = sum(facts["achieved"] * facts["numel"] for facts in said["signals"].values()) / total
    everything = activation_panel(report).rows[-1]
    assert everything[0] == "all"
    assert float(everything[3]) == pytest.approx(mean, abs=6e-4)
    assert mean == pytest.approx(said["held_out"]["sparsity"])


@pytest.mark.parametrize(("points", "warned"), [(0.0, False), (0.019, False), (0.021, True), (-0.05, True)])
def test_another_text_far_off_is_warned_of(points, warned, report, tmp_path):
    said = report["activations"]
    said["other_text"]["stdlib"]["sparsity"] = said["held_out"]["sparsity"] + points
    made = pages(report, tmp_path)
    for name in ("report.html", "README.md"):
        assert ("On stdlib the sparsity is" in made[name].decode()) == warned, name


def test_a_search_is_shown(report, tmp_path):
    report["activations"] |= {
        "sparsity": None,
        "budget": {"perplexity": 0.01},
        "search": [{"sparsity": 0.45, "ratio": 1.2}, {"sparsity": 0.225, "ratio": 1.005}],
    }
    text = visible(page(report, tmp_path))
    assert "At most +1.00% perplexity allowed 40.0 % sparsity" in text
    assert f"45.0 % {TIMES} 1.200 22.5 % {TIMES} 1.005" in text


def test_samples_shorter_than_eight_tokens_share_nothing_known(report, tmp_path):
    for facts in report["activations"]["signals"].values():
        facts["together_8"] = float("nan")
    assert "self_attn.q_proj 3 0.400" in visible(page(report, tmp_path))
    assert activation_panel(report).rows[-1][-1] == "-"


def test_names_stay_text(report, tmp_path):
    said = report["activations"]
    said |= {"method": HOSTILE, "protocol": HOSTILE, "usage": {HOSTILE: [1] * 20}}
    said["other_text"] = {HOSTILE: said["other_text"]["stdlib"]}
    html = page(report, tmp_path)
    assert not set(Page(html).elements) & {"script", "img", "a"}


# --- words -------------------------------------------------------------------------------------------------
def test_the_line_and_the_card_do_not_speak_of_pruning(outcome):
    line = one_line(outcome.report)
    assert re.match(r"skips 4\d\.\d % of the block weights per token, ", line)
    assert "prune" not in line
    card = ModelCard.load(outcome.out / "README.md")
    assert card.data.to_dict()["tags"] == ["sparsekit", "activation-sparsity", "teal"]
    assert card.text.lstrip().startswith("# model, activation sparsity by teal-40")
    own = card.text.partition("## Recipe")[0]
    assert "pruned" not in own.lower()
    assert "No weight was changed." in own
    assert f"holds for this protocol: {outcome.report['activations']['protocol']}" in own
    assert "No speed-up is expected below about 40%" in own


def test_how_to_load_it_runs_and_skips(outcome, monkeypatch):
    card = ModelCard.load(outcome.out / "README.md").text
    monkeypatch.chdir(outcome.out)
    names = {}
    exec(re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], names)  # noqa: S102 - our own text
    assert len(gates.describe(names["model"]).file.gates) == 21
    assert "Plain `from_pretrained` runs it dense" in card


def test_load_takes_what_opening_a_model_takes(outcome):
    import torch

    model = sparsekit.load(outcome.out, dtype="bf16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert gates.attached(model)


@pytest.mark.parametrize("save", ["auto", "dense"])
def test_pruned_and_sparse_says_both(save, tmp_path):
    sets = (f"save.format={save}", "stages.1.tolerance=0.03", "stages.1.allocate=uniform")
    made = thin(tiny.save("llama", tmp_path / "model"), tmp_path / "out", "wanda-50-teal-40", *sets)
    assert re.match(r"0\.50 zeros in 21/21 .*, skips 4\d\.\d % of the block weights", one_line(made.report))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["tags"] == ["sparsekit", "pruned", "sparse", "activation-sparsity", "teal", "wanda"]
    assert "pruned with wanda-50-teal-40" in card.text
    assert ("sparsekit.load(folder)" in card.text) == (save == "dense")
    assert ("gates come with the weights" in card.text) == (save == "auto")
