"""Thresholds are taken where they are used: behind signals that are thinned out already."""

from __future__ import annotations

import pytest

from sparsekit.progress import Silent
from sparsekit.thinning import Calibration
from tests.support import tiny
from tests.support.gated import plan


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("propagate", ["sparse", "dense"])
def test_the_text_of_the_calibration_loses_exactly_what_was_asked(family, propagate, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    prepared = plan(folder, "teal-50", "stages.0.allocate=uniform", f"stages.0.propagate={propagate}")
    ids = tiny.ids(12, 40)
    work = Calibration(prepared.model, prepared.activations, ids, ids, Silent())
    reading = work.read(work.gates(work.levels(0.5)), ids, "calibration")
    worst = max(abs(stat.share - 0.5) for stat in reading.dropped.values())
    assert (worst < 0.01) == (propagate == "sparse")
