"""What SparseGPT and DSnoT do to every linear of a real model, on the inputs of the dense model."""

from __future__ import annotations

from typing import Any

import torch

from sparsekit.contracts import LinearInfo, Pruned
from sparsekit.data import TextSpec, load_blocks
from sparsekit.masks import select, zeroed
from sparsekit.models.source import ModelSource
from sparsekit.pattern import Unstructured
from sparsekit.progress import Silent
from sparsekit.pruners.sparsegpt import SparseGPT, SparseGPTOptions
from sparsekit.refine.dsnot import DSnoT, DSnoTOptions
from sparsekit.solve.masked_lstsq import row_errors
from sparsekit.solve.obs import STRIP
from sparsekit.stats.gram import Gram
from sparsekit.walk import walk

SPARSITY = 0.6


def measure(source: ModelSource) -> dict[str, dict[str, float]]:
    """Return facts per linear, at 60 % on 16 x 256 tokens of the built-in text.

    `identity`: 1 if SparseGPT with H = I is magnitude pruning, see `_identity`. `update`: the output error of
    SparseGPT's weights over that of its mask alone. `dsnot_*`: see `_dsnot`, after Wanda's mask.
    """
    spec = TextSpec("builtin", samples=16, sequence_length=256)
    text = load_blocks(spec, source.tokenizer, model_max_length=source.max_length, part="calibration")
    found: dict[str, dict[str, float]] = {}
    for visit in walk(source.lazy(), text.ids, Silent(), propagate="none"):
        collected = visit.collect(visit.linears, frozenset({"gram", "moments", "sumsq"}))
        for linear in visit.linears:
            weight, stats = linear.weight().float(), collected[linear.name]
            budget = round(weight.numel() * (1 - SPARSITY))
            gram = stats["gram"].matrix
            got = SparseGPT(SparseGPTOptions(), 0).fit(linear.info, weight, stats)(Unstructured(), budget)
            alone = zeroed(weight, got.keep)
            error, without = (float(row_errors(weight, other, gram).sum()) for other in (got.weight, alone))
            facts = {"update": error / without, "identity": _identity(linear.info, weight, budget)}
            found[linear.name] = facts | _dsnot(linear.info, weight, budget, stats)
        print(f"  linears of block {visit.index}", flush=True)
    return found


def _identity(info: LinearInfo, weight: torch.Tensor, budget: int) -> float:
    """Return 1 if SparseGPT for uncorrelated inputs of equal size is magnitude pruning, strip by strip.

    The masks must be equal and the kept weights change by no more than 1e-6 of the largest.
    """
    gram = Gram(info.in_features)
    gram.update(torch.eye(info.in_features))
    got = SparseGPT(SparseGPTOptions(), 0).fit(info, weight, {"gram": gram})(Unstructured(), budget)
    keep = torch.zeros_like(got.keep)
    for first in range(0, info.in_features, STRIP):
        last = min(first + STRIP, info.in_features)
        count = budget * last // info.in_features - budget * first // info.in_features
        keep[:, first:last] = select(weight[:, first:last].abs(), Unstructured(), count, "linear")
    moved = float((got.weight - zeroed(weight, keep)).abs().max()) / float(weight.abs().max())
    return float(bool(torch.equal(got.keep, keep)) and moved <= 1e-6)


def _dsnot(info: LinearInfo, weight: torch.Tensor, budget: int, stats: Any) -> dict[str, float]:
    """Return how many times DSnoT divides the rows' mean |expected error|, as shipped and as published.

    `dsnot_exact` is 1 if both leave every row as many weights as Wanda gave it, each as it was.
    """
    mean = stats["moments"].mean
    keep = select(weight.abs() * stats["sumsq"].norm(), Unstructured(), budget, "row")
    start = Pruned(zeroed(weight, keep), keep)
    forms = {"dsnot_bias": DSnoTOptions(), "dsnot_paper_bias": DSnoTOptions(paper=True)}
    facts, exact = {}, True
    before = float(((weight - start.weight).double() @ mean).abs().mean())
    for name, options in forms.items():
        got = DSnoT(options, 0).refine(info, weight, start, Unstructured(), stats)
        after = float(((weight - got.weight).double() @ mean).abs().mean())
        exact &= torch.equal(got.keep.sum(dim=1), keep.sum(dim=1)) and torch.equal(got.weight, zeroed(weight, got.keep))
        facts[name] = before / after if after else float("inf")
    return {**facts, "dsnot_exact": float(exact)}
