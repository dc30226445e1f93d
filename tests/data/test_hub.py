"""Hub sources against a stand-in for the Hub on the loopback interface, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekit.data.hub import SHORTHANDS, _articles
from tests.support.byte_model import byte_tokenizer
from tests.support.hub_server import HubServer

SHARDS = 60
CHILD = """
import json, sys
from transformers import AutoTokenizer
from sparsekit.data import TextSpec, load_blocks
from sparsekit.errors import SparsekitError
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for case in json.load(sys.stdin):
    part = case.pop("part")
    try:
        blocks = load_blocks(TextSpec(**case), tokenizer, model_max_length=99999, part=part)
        text = tokenizer.decode(blocks.ids.reshape(-1))
        result = {"source": blocks.source, "fingerprint": blocks.fingerprint, "text": text,
                  "available": blocks.tokens_available}
    except SparsekitError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(result))
"""


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)))


def card(configs: dict[str, dict[str, str]]) -> str:
    """Return the README with which a data set declares its configurations and splits."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [f"  - {{split: {split}, path: '{path}'}}" for split, path in splits.items()]
    return "\n".join([*lines, "---", ""])


def fill(root: Path) -> None:
    stories = root / "datasets" / "org" / "stories"
    for shard in range(SHARDS):
        texts = [f"train {shard} {number}: " + "the fox runs. " * 10 for number in range(200)]
        write_jsonl(stories / "data" / f"train-{shard:05}.jsonl", texts)
    write_jsonl(stories / "data" / "test-00000.jsonl", [f"test {number}: hello" for number in range(400)])
    (stories / "README.md").write_text(card({"default": {"train": "data/train-*", "test": "data/test-*"}}))
    c4 = root / "datasets" / "allenai" / "c4"
    for split in ("train", "validation"):
        write_jsonl(c4 / "en" / f"{split}.jsonl", [f"c4 {split} {number}" for number in range(300)])
        write_jsonl(c4 / "de" / f"{split}.jsonl", ["falsch"] * 300)
    (c4 / "README.md").write_text(
        card({name: {split: f"{name}/{split}.jsonl" for split in ("train", "validation")} for name in ("de", "en")})
    )
    write_wikitext(root / "datasets" / "Salesforce" / "wikitext")


def write_wikitext(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    config = SHORTHANDS["wikitext2"].config
    assert config is not None
    (folder / config).mkdir(parents=True)
    for split in ("train", "test"):
        lines = []
        for number in range(20):
            lines += [
                "",
                f" = Article {number} of {split} = \n",
                "",
                f" body {number} \n",
                "",
                " = = Part = = \n",
                " end \n",
            ]
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), folder / config / f"{split}.parquet")
    (folder / "README.md").write_text(
        card({config: {split: f"{config}/{split}.parquet" for split in ("train", "test")}})
    )


CASES: dict[str, dict[str, Any]] = {
    "train": {"source": "org/stories", "samples": 6, "sequence_length": 500},
    "train again": {"source": "org/stories", "samples": 6, "sequence_length": 500},
    "other seed": {"source": "org/stories", "samples": 6, "sequence_length": 500, "seed": 1},
    "test": {"source": "org/stories", "samples": 6, "sequence_length": 100, "part": "held_out"},
    "c4": {"source": "c4", "samples": 6, "sequence_length": 100},
    "c4 held out": {"source": "c4", "samples": 6, "sequence_length": 100, "part": "held_out"},
    "c4 other config": {"source": "c4", "config": "de", "samples": 6, "sequence_length": 100},
    "wikitext2": {"source": "wikitext2", "samples": 6, "sequence_length": 100},
    "wikitext2 held out": {"source": "wikitext2", "samples": 6, "sequence_length": 100, "part": "held_out"},
    "too few": {"source": "c4", "samples": 600, "sequence_length": 100},
    "no such data set": {"source": "org/nothing", "samples": 1, "sequence_length": 8},
    "no such split": {"source": "org/stories", "split": "dev", "samples": 1, "sequence_length": 8},
    "no such config": {"source": "c4", "config": "xx", "samples": 1, "sequence_length": 8},
    "no such field": {"source": "org/stories", "field": "body", "samples": 1, "sequence_length": 8},
    "field is no text": {"source": "org/stories", "field": "n", "samples": 1, "sequence_length": 8},
    "no name": {"source": "not a name!", "samples": 1, "sequence_length": 8},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    fill(root)
    with HubServer(root) as server:
        yield server


@pytest.fixture(scope="module")
def results(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(hub, tmp_path_factory, CASES)


def run(hub: HubServer, factory: pytest.TempPathFactory, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    folder = factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    asked = [{"part": "calibration", **case} for case in cases.values()]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        input=json.dumps(asked),
        env=hub.environment(factory.mktemp("home")),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def test_the_text_of_the_split_comes_in_seeded_order(results: dict[str, Any]) -> None:
    train, other = results["train"], results["other seed"]
    assert train["text"].startswith("train ")
    assert train["source"] == "org/stories, split train, field text"
    assert train["available"] is None
    assert train["fingerprint"] == results["train again"]["fingerprint"] != other["fingerprint"]
    assert results["test"]["text"].startswith("test ")
    assert results["test"]["source"] == "org/stories, split test, field text"


def test_another_process_draws_the_same(
    hub: HubServer, results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    hub.requests.clear()
    again = run(hub, tmp_path_factory, {"train": CASES["train"]})
    assert again["train"]["fingerprint"] == results["train"]["fingerprint"]
    read = {path for path in hub.requests if "/data/train-" in path and path.startswith("GET")}
    assert 1 <= len(read) <= SHARDS / 2  # streamed: most of the data set was never asked for


def test_shorthands(results: dict[str, Any]) -> None:
    assert results["c4"]["source"] == "allenai/c4, config en, split train, field text"
    assert results["c4"]["text"].startswith("c4 train ")
    assert results["c4 held out"]["text"].startswith("c4 validation ")
    assert "falsch" in results["c4 other config"]["text"]
    assert results["wikitext2"]["source"] == ("Salesforce/wikitext, config wikitext-2-raw-v1, split train, field text")
    articles = results["wikitext2"]["text"].split("</s>")
    assert articles[0].startswith("= Article ")
    assert articles[0].endswith("= = Part = =\n\nend")
    assert "of test" in results["wikitext2 held out"]["text"]
    assert "of train" not in results["wikitext2 held out"]["text"]


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("too few", "TooFewTokens", "need 600 blocks = 60,000 tokens"),
        ("no such data set", "SourceUnavailable", "org/nothing: the Hugging Face Hub did not give this data set"),
        ("no such split", "SourceUnavailable", "cannot be read with split 'dev'"),
        ("no such config", "SourceUnavailable", "allenai/c4 (xx): cannot be read with split 'train'"),
        ("no such field", "CalibrationError", "field 'body' is not there; fields: text, n"),
        ("field is no text", "CalibrationError", "field 'n' holds int; fields: text, n"),
        ("no name", "SourceUnavailable", "not a name!"),
    ],
)
def test_errors(results: dict[str, Any], case: str, error: str, message: str) -> None:
    assert results[case]["error"] == error
    assert message in results[case]["message"]
    assert "\n" not in results[case]["message"]


@pytest.mark.parametrize("case", ["no such data set", "no name"])
def test_an_unreachable_source_names_the_alternatives(results: dict[str, Any], case: str) -> None:
    assert "--set calibration.source=builtin" in results[case]["message"]
    assert "--set calibration.source=text.jsonl" in results[case]["message"]


def test_the_stand_in_serves_a_model_snapshot(hub: HubServer, tmp_path: Path) -> None:
    model = hub.folder("models", "org/tiny")
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "weights.bin").write_bytes(bytes(range(256)) * 40)
    code = "from huggingface_hub import snapshot_download; print(snapshot_download('org/tiny'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(tmp_path), capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip())
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "sub" / "weights.bin").read_bytes() == bytes(range(256)) * 40


def test_lines_are_joined_to_articles() -> None:
    pattern = SHORTHANDS["wikitext2"].article
    assert pattern is not None
    lines = [" = One = \n", " a \n", " = = Not a title = = \n", " b \n", " = Two = \n", " c \n"]
    assert list(_articles(lines, pattern)) == ["= One =\n\na\n\n= = Not a title = =\n\nb", "= Two =\n\nc"]
    assert list(_articles([], pattern)) == []
