"""What is drawn from measured figures: quotients, the honest sentence, tables of 80 columns, pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from sparsekit.benchmark import plot
from sparsekit.benchmark.result import METRICS, noise, write
from sparsekit.cli import render
from sparsekit.cli.bench import page
from sparsekit.errors import MissingExtra, UsageError
from tests.benchmark.support import CONTENDER, ROUND, benchmark

KINDS = {metric.key: metric for metric in METRICS}


def test_medians_and_quotients():
    found = benchmark(speed=3.0, size=0.45)
    torch, tuned = found.contenders[1:]
    assert CONTENDER.decode_tokens_per_second == pytest.approx(31 / 1.55)
    assert CONTENDER.prefill_tokens_per_second == pytest.approx(1024)
    for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "first_token_seconds", "load_seconds"):
        assert found.quotient(KINDS[key], torch) == pytest.approx(3.0)
        assert found.quotient(KINDS[key], tuned) == pytest.approx(2.0)
    assert found.quotient(KINDS["disk_bytes"], torch) == pytest.approx(0.45)
    assert found.quotient(KINDS["resident_bytes"], replace(torch, resident_bytes=None)) is None


@pytest.mark.parametrize(
    ("speed", "size", "lost"),
    [
        (3.0, 0.45, set()),
        (1.5, 0.45, set()),  # as fast as tuned dense: not slower
        (1.2, 0.45, {("streaming", kind) for kind in ("speed", "seconds")}),
        (0.9, 1.1, {(name, kind) for name in ("torch", "streaming") for kind in ("speed", "seconds", "bytes")}),
    ],
)
def test_it_is_said_when_dense_is_better(speed, size, lost):
    found = benchmark(speed, size)
    assert {(other.name, metric.kind) for metric, other in found.dense_is_better()} == lost
    text = page(found)
    assert ("In nothing measured here is a dense model better." in text) == (not lost)
    assert ("Dense is better here in" in text) == bool(lost)
    for metric, other in found.dense_is_better():
        theirs = metric.text(metric.of(other))
        title = {"torch": "torch eager", "streaming": "tuned dense"}[other.name]
        assert any(
            metric.label in line and f"{title} {theirs}" in line and " against " in line for line in text.splitlines()
        )


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("speed", [3.0, 0.0123])
def test_the_page_fits_80_columns(speed, streaming):
    text = page(benchmark(speed, streaming=streaming))
    assert max(len(line) for line in text.splitlines()) <= render.WIDTH
    assert ("tuned dense" in text) == streaming
    assert "note: other work is running" in text
    assert "2:4" in text


def test_rounds_that_differ_are_noted():
    assert noise((CONTENDER,)) == []
    slow = replace(CONTENDER, rounds=(ROUND, replace(ROUND, decode_seconds=3.1)))
    (text,) = noise((CONTENDER, slow))
    assert "100%" in text


def test_the_document_is_json_with_every_figure(tmp_path):
    found = benchmark()
    write(found, tmp_path / "found.json")
    document = json.loads((tmp_path / "found.json").read_text())
    assert document == json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(document["quotients"]) == {"torch", "streaming"}
    assert set(document["quotients"]["torch"]) == set(KINDS)
    for contender in document["contenders"]:
        assert set(KINDS) <= set(contender)
        assert len(contender["rounds"]) == 3
    assert document["layers"][0]["times_torch"] == pytest.approx(4.8)
    assert document["layers"][0]["roofline_share"] == pytest.approx(0.9)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(tmp_path, suffix, streaming):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    file = tmp_path / f"picture{suffix}"
    plot.draw(benchmark(streaming=streaming), file)
    if suffix == ".png":
        assert file.read_bytes().startswith(b"\x89PNG")
    else:
        text = file.read_text()
        ET.fromstring(text)  # noqa: S314 - our own file
        assert ("tuned dense" in text) == streaming


def test_a_picture_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        plot.require(tmp_path / "picture.jpg")
    with pytest.raises(UsageError, match="no such folder"):
        plot.require(tmp_path / "nowhere" / "picture.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'sparsekit\[report\]'"):
        plot.require(tmp_path / "picture.png")
