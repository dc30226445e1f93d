"""The pages of real runs on tiny models: what they say, what they load, what they give away."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from sparsekit import run
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from sparsekit.report import one_line, pages
from tests.support import tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=3",
    "calibration.sequence_length=32",
    "evaluate.samples=3",
    "evaluate.sequence_length=32",
    "save.format=dense",
]
SOURCE_CARD = """---
license: apache-2.0
language:
- en
tags:
- chat
- pruned
datasets:
- some/data
base_model: first/ancestor
base_model_relation: finetune
pipeline_tag: fill-mask
model-index:
- name: dense
  results: []
extra_field: kept
---
# The dense model

It has its own words, `code` and a [link](https://example.org).
"""


def prune(family, folder, *, recipe="wanda-50", card=None, evaluation=True, sets=(), **options):
    source = tiny.save(family, folder / "some-model", dtype=torch.bfloat16, **options)
    if card is not None:
        (source / "README.md").write_text(card)
    out = folder / "out put"
    prepared = prepare(load_recipe(recipe, [*SMALL, *sets]), open_model(str(source), Silent()))
    command = ["sparsekit", "prune", str(source), "-r", recipe, f"--out={out}"]
    return run.execute(prepared, out, Silent(), evaluation=evaluation, command=command)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return prune("llama", tmp_path_factory.mktemp("llama"), card=SOURCE_CARD)


@pytest.fixture
def report(outcome):
    return copy.deepcopy(outcome.report)


def written(report, folder):
    return {name: data.decode() for name, data in pages(report, folder).items()}


class Page(HTMLParser):
    """Collects elements, attributes and visible text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


# --- what a run leaves -------------------------------------------------------------------------------------
def test_a_run_leaves_the_three_pages(outcome):
    for name in ("README.md", "report.html"):
        assert (outcome.out / name).stat().st_size > 2000
    assert json.loads((outcome.out / "report.json").read_text()) == json.loads(json.dumps(outcome.report))


def test_the_page_says_what_was_measured(outcome):
    page = Page((outcome.out / "report.html").read_text())
    text = " ".join(" ".join(page.text).split())
    evaluation, stage = outcome.report["evaluation"], outcome.report["stages"][0]
    for expected in (
        "wanda-50 on some-model",
        f"{evaluation['perplexity']['tokens']:,} predicted tokens, sequence length 32",
        evaluation["perplexity"]["source"],
        "Perplexity (lower is better)",
        "KL divergence to base",
        f"{stage['kept']:,} of {stage['numel']:,}",
        outcome.report["calibration"]["fingerprint"],
        "mlp.down_proj",
        one_line(outcome.report),
    ):
        assert expected in text, expected


def test_every_linear_stands_in_every_heat_map(outcome):
    html = (outcome.out / "report.html").read_text()
    for measure in ("sparsity", "weight error", "output error"):
        for block in range(3):
            for kind in ("self_attn.q_proj", "mlp.down_proj"):
                assert f"<title>block {block}, {kind}: {measure} " in html
    assert html.count("<rect ") == 3 * len(outcome.report["stages"][0]["linears"])


def test_the_page_loads_nothing(outcome):
    html = (outcome.out / "report.html").read_text()
    page = Page(html)
    assert not set(page.elements) & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
    }
    assert not [a for a in page.attributes if a[1] in ("src", "href", "srcset", "xlink:href", "style", "action")]
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_nothing_local_is_published(outcome):
    local = str(outcome.out.parent)
    assert local in (outcome.out / "report.json").read_text()  # so there is something to hide
    for name in ("README.md", "report.html"):
        text = (outcome.out / name).read_text()
        assert local not in text
        assert not re.search(r"/(tmp|home|root|Users|work)/", text), name
        assert "some-model" in text
    assert "sparsekit prune some-model -r wanda-50 '--out=out put'" in (outcome.out / "README.md").read_text()


# --- model card --------------------------------------------------------------------------------------------
def test_the_source_card_is_kept_and_its_front_matter_merged(outcome):
    card = ModelCard.load(outcome.out / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert data["datasets"] == ["some/data"]
    assert data["extra_field"] == "kept"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["chat", "pruned", "sparsekit", "sparse", "wanda"]
    assert data["base_model"] == "first/ancestor"  # the source is a local folder, what it came from is on the Hub
    for of_the_source_alone in ("model-index", "base_model_relation"):
        assert of_the_source_alone not in data
    own, _, theirs = card.text.partition("The card of the source model follows.")
    assert "## Limits" in own
    assert theirs.strip("* \n").startswith("# The dense model")
    assert "`code` and a [link](https://example.org)" in theirs


def test_the_card_round_trips(outcome):
    text = (outcome.out / "README.md").read_text()
    assert str(ModelCard(text)) == text


def test_the_card_holds_command_recipe_scores_and_a_loading_example_that_runs(outcome, monkeypatch):
    card = ModelCard.load(outcome.out / "README.md").text
    recipe = re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)[1]
    assert yaml.safe_load(recipe) == outcome.report["recipe"]
    ratio = outcome.report["evaluation"]["comparison"]["ratio"]
    assert "| Perplexity (lower is better) | " in card
    assert f"{ratio:.3f}"[:4] in card
    monkeypatch.chdir(outcome.out)
    names = {}
    exec(re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], names)  # noqa: S102 - our own text
    assert names["model"].config.model_type == "llama"
    assert names["tokenizer"]("ab")["input_ids"]


@pytest.mark.parametrize("revision", [None, "0123456789abcdef0123456789abcdef01234567"])
def test_a_base_model_is_named_only_if_it_is_on_the_hub(revision, report, tmp_path):
    report["model"] |= {"name": "org/dense-1b", "label": "dense-1b", "revision": revision}
    made = written(report, tmp_path)
    data = ModelCard(made["README.md"]).data.to_dict()
    if revision is None:
        assert "base_model" not in data
        assert "org/" not in made["README.md"] + made["report.html"]
    else:
        assert data["base_model"] == "org/dense-1b"
        assert "(https://huggingface.co/org/dense-1b) (revision `0123456789ab`)" in made["README.md"]


@pytest.mark.parametrize(
    ("card", "license_", "kept"),
    [
        ("no front matter\n", None, "no front matter"),
        ("---\r\nlicense: mit\r\n---\r\nWindows\r\n", "mit", "Windows"),
        ("---\nlicense: [unclosed\n---\nbody\n", None, "license: [unclosed"),
        ("---\n- a list\n---\nbody\n", None, "- a list"),
        ("---\n---\nempty\n", None, "empty"),
        ("---\nlicense: mit\nbase_model: /home/me/model\ntags: one\n---\n", "mit", None),
        ("", None, None),
    ],
)
def test_odd_source_cards(card, license_, kept, report, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    made = ModelCard(written(report, tmp_path)["README.md"])
    assert made.data.to_dict().get("license") == license_
    assert "base_model" not in made.data.to_dict()
    assert made.data.to_dict()["library_name"] == "transformers"
    assert ("card of the source model" in made.text) == (kept is not None)
    assert kept is None or kept in made.text


def test_a_card_that_is_not_utf8_is_kept_as_far_as_it_can_be_read(report, tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\nna\xefve\n")
    assert "na\ufffdve" in written(report, tmp_path)["README.md"]


def test_a_pruned_model_pruned_again_keeps_both_stories(outcome, report):
    card = ModelCard(written(report, outcome.out)["README.md"])
    assert card.text.count("## Limits") == 2
    assert card.data.to_dict()["tags"].count("sparsekit") == 1


# --- hostile and unusual reports ---------------------------------------------------------------------------
HOSTILE = "<img src=x onerror=alert(1)>\"'`|\n# heading\n```\n<script>alert(2)</script> {{ 7*7 }} [a](javascript:b)"


def hostile(report):
    report["model"] |= {"name": HOSTILE, "label": HOSTILE, "model_type": HOSTILE}
    report["recipe"] |= {"name": HOSTILE, "description": HOSTILE}
    report["calibration"]["source"] = HOSTILE
    report["command"] = ["sparsekit", HOSTILE]
    report["missed_gates"] = [HOSTILE]
    report["evaluation"]["perplexity"]["source"] = HOSTILE
    stage = report["stages"][0]
    stage |= {"notes": [HOSTILE], "ignored": [HOSTILE], "method": HOSTILE}
    stage["linears"] = {f"{HOSTILE}.{i}.x{HOSTILE}": facts for i, facts in enumerate(stage["linears"].values())}
    return report


def test_hostile_names_stay_text_on_the_page(report, tmp_path):
    html = written(hostile(report), tmp_path)["report.html"]
    page = Page(html)
    assert not set(page.elements) & {"script", "img", "a"}
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in ("src", "href")]
    text = "".join(page.text)
    assert "<script>alert(2)</script>" in text
    assert "{{ 7*7 }}" in text
    assert "49" not in re.findall(r"\{\{.*?\}\}|\b49\b", text)


def test_hostile_names_stay_text_in_the_card(report, tmp_path):
    text = written(hostile(report), tmp_path)["README.md"]
    card = ModelCard(text)
    assert card.data.to_dict()["library_name"] == "transformers"
    prose = []
    fence = None
    for line in card.text.splitlines():
        opened = re.match(r"(`{3,})", line)
        if fence is None and opened:
            fence = opened[1]
        elif fence is not None:
            fence = None if line == fence else fence
        else:
            prose.append(re.sub(r"(`+) .*? \1|`[^`]*`", "", line))
    assert fence is None
    assert "# heading" not in prose
    assert not [line for line in prose if re.search(r"<(img|script)|(?<!\\)\[a\]", line)]
    for table in re.findall(r"(?:^\|.*\n)+", card.text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_without_evaluation(report, tmp_path):
    report["evaluation"] = None
    made = written(report, tmp_path)
    assert "was not evaluated in this run" in made["report.html"]
    assert "was not evaluated in this run" in made["README.md"]
    assert "perplexity" not in one_line(report)


def test_evaluation_without_a_baseline(report, tmp_path):
    report["evaluation"] |= {"baseline": None, "comparison": None}
    made = written(report, tmp_path)
    assert "| pruned |" in made["README.md"]
    assert "| base |" not in made["README.md"]
    value = report["evaluation"]["perplexity"]["perplexity"]
    assert re.search(r", perplexity [\d,.]+$", one_line(report))
    assert f"{value:.0f}"[:2] in one_line(report).rpartition(" ")[2].replace(",", "")


def test_an_infinite_perplexity_is_said_and_the_json_stays_strict(report, tmp_path):
    comparison = report["evaluation"]["comparison"]
    comparison["model"]["perplexity"] = comparison["ratio"] = float("inf")
    comparison["model"]["stderr"] = float("nan")
    made = written(report, tmp_path)
    stored = json.loads(made["report.json"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert stored["evaluation"]["comparison"]["ratio"] == "inf"
    assert "inf" in one_line(stored)
    assert "inf" in made["README.md"]


def test_missed_gates_are_seen_first(report, tmp_path):
    report["missed_gates"] = ["perplexity ratio is 1.9, need at most 1.2"]
    made = written(report, tmp_path)
    assert made["report.html"].index("need at most 1.2") < made["report.html"].index('id="quality"')
    assert "Quality gate missed: perplexity ratio is 1.9" in made["README.md"]


def test_tasks_show_documents_and_direction(report, tmp_path):
    report["evaluation"]["tasks"] = [
        {"task": "my|task", "metric": "acc", "value": 0.5, "stderr": 0.05, "baseline": 0.6, "baseline_stderr": 0.04,
         "difference": -0.1, "difference_stderr": 0.03, "higher_is_better": True, "samples": 1200},
    ]  # fmt: skip
    text = written(report, tmp_path)["README.md"]
    row = "| my\\|task: acc (1,200 documents) (higher is better) | 0.600 ± 0.040 | 0.500 ± 0.050 | -0.100 ± 0.030 |"
    assert row in text


def test_random_without_calibration_text(tmp_path):
    made = prune("gpt2", tmp_path, recipe="magnitude-50", evaluation=False)
    html = (made.out / "report.html").read_text()
    assert "Weight error per matrix" in html
    assert "Output error per matrix" not in html
    assert "Most changed matrices, by weight error" in html
    assert "No calibration text was needed" in (made.out / "README.md").read_text()
    assert "attn.c_attn" in html


def test_experts_of_a_layer_share_a_cell(tmp_path):
    made = prune("mixtral", tmp_path, evaluation=False)
    html = (made.out / "report.html").read_text()
    assert "block 0, mlp.experts.*.down_proj: sparsity 0.5000 (mean of 4, " in html
    assert html.count("<rect ") == 3 * 3 * 6  # measures, blocks, kinds
    assert len(made.report["stages"][0]["linears"]) == 3 * (4 + 4 * 2)


def test_one_line(report):
    report["bytes"] = {"source": 2_200_000_000, "output": 269_062_376}
    comparison = report["evaluation"]["comparison"]
    comparison["baseline"]["perplexity"], comparison["model"]["perplexity"], comparison["ratio"] = 32.71, 62.0, 1.8954
    assert one_line(report, Path("OUT")) == (
        "0.50 zeros in 21/21 target matrices (100.0 % of block weights), 2.20 GB -> 269 MB, "
        "perplexity 32.7 -> 62.0 (1.90x), OUT"
    )
