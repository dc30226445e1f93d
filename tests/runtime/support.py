"""Checkpoints of one run in several forms, and the comparison of what is loaded from them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sparsekit import run
from sparsekit.convert import convert
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from tests.support import tiny

SMALL = ["calibration.source=builtin", "calibration.samples=3", "calibration.sequence_length=32"]


def prune(source: Path, out: Path, form: str, recipe: str = "wanda-50", *more: str) -> Path:
    chosen = load_recipe(recipe, [*SMALL, f"save.format={form}", *more])
    prepared = prepare(chosen, open_model(str(source), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=False).out


def both(
    family: str,
    folder: Path,
    *,
    form: str = "bitmask",
    values: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    **changes,
):
    """Return (dense, packed) checkpoints of two runs that differ in save.format and save.values alone."""
    source = tiny.save(family, folder / "source", dtype=dtype, **changes)
    packed = prune(source, folder / "packed", form, "wanda-50", f"save.values={values}")
    return prune(source, folder / "dense", "dense"), packed


def converted(family: str, folder: Path, form: str = "bitmask", **changes):
    """Return (dense, packed) checkpoints, the packed one converted from the dense one."""
    source = tiny.save(family, folder / "source", dtype=torch.bfloat16, **changes)
    dense = prune(source, folder / "dense", "dense", "magnitude-50")
    return dense, convert(dense, form, folder / "packed", Silent()).out


def load(folder: Path, **options):
    """Load without a single missing or unexpected key."""
    options = {"dtype": "auto", **options}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def assert_same_weights(left, right):
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def assert_same(left, right):
    assert_same_weights(left, right)
    x = tiny.ids(2)
    with torch.no_grad():
        assert torch.equal(left(x).logits, right(x).logits)
