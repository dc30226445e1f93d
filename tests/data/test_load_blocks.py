from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsekit.data import DEFAULT_SEQUENCE_LENGTH, TextSpec, builtin, files, load_blocks
from sparsekit.data.documents import SHUFFLE_BUFFER, shuffled
from sparsekit.errors import CalibrationError, EmptyText, SourceUnavailable, TooFewTokens
from tests.support.byte_model import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def load(tokenizer: Any, maximum: float = 1e30, part: Any = "calibration", **spec: Any) -> Any:
    return load_blocks(TextSpec(**spec), tokenizer, model_max_length=int(maximum), part=part)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text, "id": 1}) + "\n" for text in texts))
    return str(path)


# --- builtin ---
def test_builtin_parts_share_no_paragraph_and_divide_about_three_to_one() -> None:
    parts = builtin.parts()
    calibration = {paragraph for document in parts["calibration"] for paragraph in document}
    held_out = {paragraph for document in parts["held_out"] for paragraph in document}
    assert len(calibration) > 300
    assert len(held_out) > 100
    assert not calibration & held_out
    characters = sum(map(len, calibration)), sum(map(len, held_out))
    assert 0.65 < characters[0] / sum(characters) < 0.85
    assert sum(characters) > 200_000


def test_builtin_topics_quote_each_other_so_dividing_by_name_alone_would_leak() -> None:
    from pydoc_data.topics import topics

    raw: dict[str, set[str]] = {"calibration": set(), "held_out": set()}
    for name, text in topics.items():
        raw[builtin.part_of(name)].update(builtin._prose(text))
    assert raw["calibration"] & raw["held_out"]


def test_builtin_division_is_fixed_for_ever() -> None:
    calibration = ("types", "compound", "naming", "string-methods")
    held_out = ("import", "strings", "typesseq", "exceptions")
    assert {builtin.part_of(name) for name in calibration} == {"calibration"}
    assert {builtin.part_of(name) for name in held_out} == {"held_out"}


def test_builtin_blocks_of_the_two_parts_differ(tokenizer: Any) -> None:
    blocks = [load(tokenizer, part=part, samples=20, sequence_length=128) for part in ("calibration", "held_out")]
    assert blocks[0].fingerprint != blocks[1].fingerprint
    assert "calibration part" in blocks[0].source
    assert "held-out part" in blocks[1].source
    rows = [{tuple(row) for row in block.ids.tolist()} for block in blocks]
    assert len(rows[0]) == len(rows[1]) == 20
    assert not rows[0] & rows[1]


def test_builtin_is_the_same_in_another_process_whatever_the_hash_seed(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer;"
        "from sparsekit.data import TextSpec, load_blocks;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(load_blocks(TextSpec(samples=5, sequence_length=64, seed=3), t, model_max_length=99,"
        " part='calibration').fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == load(tokenizer, samples=5, sequence_length=64, seed=3).fingerprint


# --- packing ---
def test_packing_against_a_row_made_by_hand(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["abcd", "", "efg"])
    blocks = load(tokenizer, source=source, samples=4, sequence_length=2)
    one = {letter: tokenizer(letter)["input_ids"][0] for letter in "abcdefg"}
    row = [one["a"], one["b"], one["c"], one["d"], tokenizer.eos_token_id, one["e"], one["f"], one["g"]]
    assert blocks.ids.reshape(-1).tolist() == row
    assert blocks.tokens_available == 8
    assert blocks.ids.dtype.is_signed
    assert (blocks.samples, blocks.sequence_length) == (4, 2)


def test_every_block_begins_with_bos_when_the_tokenizer_adds_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=True)
    source = write_jsonl(tmp_path / "a.jsonl", ["abcdef"])
    blocks = load(tokenizer, source=source, samples=2, sequence_length=4)
    assert blocks.ids.shape == (2, 4)
    assert blocks.ids[:, 0].tolist() == [0, 0]
    assert tokenizer.decode(blocks.ids[:, 1:].reshape(-1)) == "abcdef"
    with pytest.raises(CalibrationError, match="no room"):
        load(tokenizer, source=source, samples=1, sequence_length=1)


def test_without_eos_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(eos=False)
    source = write_jsonl(tmp_path / "a.jsonl", ["ab", "cd"])
    blocks = load(tokenizer, source=source, samples=1, sequence_length=6)
    assert tokenizer.decode(blocks.ids[0]) == "ab\n\ncd"


def test_seed_chooses_blocks_without_replacement(tokenizer: Any) -> None:
    def rows(seed: int) -> list[tuple[int, ...]]:
        return [tuple(row) for row in load(tokenizer, samples=50, sequence_length=64, seed=seed).ids.tolist()]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)
    every = load(tokenizer, samples=None, sequence_length=64)
    assert every.samples == every.tokens_available // 64
    assert len(set(rows(0))) == 50
    assert set(rows(0)) <= {tuple(row) for row in every.ids.tolist()}


@pytest.mark.parametrize(("maximum", "expected"), [(1e30, 2048), (8192, 2048), (512, 512)])
def test_default_sequence_length(tokenizer: Any, maximum: float, expected: int) -> None:
    assert load(tokenizer, maximum, samples=2).sequence_length == expected
    assert DEFAULT_SEQUENCE_LENGTH == 2048


def test_longer_than_the_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"sequence_length 600 exceeds the model's maximum 512"):
        load(tokenizer, 512, sequence_length=600)


@pytest.mark.parametrize("spec", [{"samples": 0}, {"sequence_length": 0}])
def test_nonsense_sizes_are_refused(spec: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match="at least 1, got 0"):
        TextSpec(**spec)


# --- too little text ---
def test_too_few_tokens_says_what_would_fit(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 100])
    with pytest.raises(TooFewTokens) as caught:
        load(tokenizer, source=source, samples=4, sequence_length=40)
    assert "100 tokens = 2 blocks of 40, need 4 blocks = 160 tokens" in caught.value.message
    assert "calibration.samples=2 or --set calibration.sequence_length=25" in str(caught.value.hint)
    load(tokenizer, source=source, samples=2, sequence_length=40)
    load(tokenizer, source=source, samples=4, sequence_length=25)


def test_too_few_tokens_with_bos_suggests_lengths_that_work(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 100])
    tokenizer = byte_tokenizer(bos=True)
    with pytest.raises(TooFewTokens, match=r"sequence_length=26 or a source with more"):
        load(tokenizer, source=source, samples=4, sequence_length=200)
    assert load(tokenizer, source=source, samples=4, sequence_length=26).samples == 4


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", '{"text": "  "}\n'), ("a.txt", "\n \n"), ("a.json", "[]")],
)
def test_empty_text(tmp_path: Path, tokenizer: Any, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EmptyText):
        load(tokenizer, source=str(tmp_path / name), samples=1, sequence_length=4)


# --- files ---
def test_the_four_kinds_of_file_give_the_same_blocks(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["first text", "second\nwith two lines", "third"]
    write_jsonl(tmp_path / "a.jsonl", texts, field="body")
    (tmp_path / "b.json").write_text(json.dumps([{"body": text} for text in texts]))
    (tmp_path / "c.txt").write_text("\n\n".join(texts) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.json").write_text(json.dumps(texts))
    found = {
        load(tokenizer, source=str(path), field="body", samples=3, sequence_length=8).fingerprint
        for path in sorted(tmp_path.iterdir())
    }
    assert len(found) == 1


def test_a_glob_reads_its_files_sorted(tmp_path: Path, tokenizer: Any) -> None:
    for name, text in (("2.jsonl", "bb"), ("1.jsonl", "aa"), ("3.jsonl", "cc")):
        write_jsonl(tmp_path / name, [text])
    blocks = load(tokenizer, source=str(tmp_path / "*.jsonl"), samples=1, sequence_length=8)
    assert tokenizer.decode(blocks.ids[0]) == "aa</s>bb</s>cc"
    assert "3 files" in blocks.source


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON at column"),
        ("a.jsonl", '{"body": "x", "id": 2}\n', r"a\.jsonl:1: no field 'text'; fields there: body, id"),
        ("a.jsonl", '{"text": 5}\n', r"a\.jsonl:1: field 'text' holds int, need text"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: need an object with the field 'text', got list"),
        ("a.json", '[{"text": "x"},\n oops]', r"a\.json:2: not JSON"),
        ("a.json", '[{"content": "x"}]', r"a\.json: record 0: no field 'text'; fields there: content"),
        ("a.parquet", "not parquet at all", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_broken_files(tmp_path: Path, tokenizer: Any, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load(tokenizer, source=str(tmp_path / name), samples=1, sequence_length=1)


def test_a_parquet_file_without_the_field_lists_its_fields(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(CalibrationError, match=r"no field 'text'; fields there: n, body"):
        load(tokenizer, source=str(tmp_path / "d.parquet"), samples=1, sequence_length=1)


def test_a_file_that_is_not_utf8(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(CalibrationError, match=r"a\.txt: byte 3 is not UTF-8"):
        load(tokenizer, source=str(tmp_path / "a.txt"), samples=1, sequence_length=1)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "folder/missing.txt", "*.parquet", "/nowhere/x.md"])
def test_a_missing_file_is_never_tried_on_the_hub(tokenizer: Any, source: str) -> None:
    with pytest.raises(SourceUnavailable, match=r"no (such file|file matches).*calibration.source=builtin"):
        load(tokenizer, source=source)


def test_a_folder_and_an_unknown_kind(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(SourceUnavailable, match=r"is a folder"):
        load(tokenizer, source=str(tmp_path))
    with pytest.raises(SourceUnavailable, match=r"'\.csv'.*\.jsonl, \.json, \.txt, \.parquet"):
        load(tokenizer, source=str(tmp_path / "a.csv"))


@pytest.mark.parametrize("spec", [{"source": "builtin", "field": "x"}, {"source": "x.jsonl", "split": "train"}])
def test_settings_that_do_not_apply_are_refused(tokenizer: Any, spec: dict[str, str]) -> None:
    with pytest.raises(CalibrationError, match="Remove them"):
        load(tokenizer, **spec)


def test_large_files_are_streamed_in_seeded_order(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"document number {number}" for number in range(3000)])
    monkeypatch.setattr(files, "STREAM_FROM_BYTES", 1000)
    first = load(tokenizer, source=source, samples=20, sequence_length=32)
    assert first.tokens_available is None
    assert first.fingerprint == load(tokenizer, source=source, samples=20, sequence_length=32).fingerprint
    assert first.fingerprint != load(tokenizer, source=source, samples=20, sequence_length=32, seed=1).fingerprint
    with pytest.raises(CalibrationError, match="samples must be a number"):
        load(tokenizer, source=source, samples=None, sequence_length=32)


@pytest.mark.parametrize("count", [0, 1, SHUFFLE_BUFFER, SHUFFLE_BUFFER * 3 + 7])
def test_shuffling_a_stream_loses_and_repeats_nothing(count: int) -> None:
    texts = [str(number) for number in range(count)]
    order = list(shuffled(texts, 5))
    assert sorted(order) == sorted(texts)
    assert order == list(shuffled(texts, 5))
    assert count < 2 or order != texts


def test_only_the_needed_documents_of_a_stream_are_read() -> None:
    read = 0

    def documents() -> Any:
        nonlocal read
        for number in range(10**6):
            read += 1
            yield f"text {number}"

    stream = shuffled(documents(), 0)
    for _ in range(10):
        next(stream)
    assert read == SHUFFLE_BUFFER + 10


def test_offline_hub_names_the_alternatives(tmp_path: Path, tokenizer: Any) -> None:
    code = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "from sparsekit.data import TextSpec, load_blocks; from sparsekit.errors import SourceUnavailable\n"
        "spec = TextSpec('c4', samples=1, sequence_length=8)\n"
        "try: load_blocks(spec, t, model_max_length=99, part='calibration')\n"
        "except SourceUnavailable as error: print(error)"
    )
    tokenizer.save_pretrained(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.startswith("allenai/c4 (en): the Hugging Face Hub did not give this data set")
    assert "--set calibration.source=builtin" in printed
    assert "calibration.source=text.jsonl" in printed
    assert printed.count("\n") == 1
