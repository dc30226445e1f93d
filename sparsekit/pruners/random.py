"""Random pruning: the null every report is read against.

What it does: keeps weights drawn uniformly.
Source: the baseline of the pruning literature; Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning",
    arXiv 2202.02643.
Shapes: weight [out, in] -> keep [out, in].
Cost: one draw and one selection.
Deviations: the draw depends on (seed, linear name) alone, so it does not change with the order of the walk.
Numbers: far worse than magnitude on any trained model (tests/integration/test_order.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import LayerPruner, Level, LinearInfo, MethodOptions, Stats
from sparsekit.lazy import torch
from sparsekit.masks import Group, ranked
from sparsekit.rng import derive

if TYPE_CHECKING:
    from torch import Tensor


class RandomOptions(MethodOptions):
    """Options of `random`."""

    group: Group = "row"


class Random(LayerPruner[RandomOptions]):
    """Keep weights drawn uniformly from (seed, linear name)."""

    options_type = RandomOptions
    nested = True

    def fit(self, linear: LinearInfo, weight: Tensor, stats: Stats) -> Level:
        """Draw one score per weight."""
        generator = torch.Generator().manual_seed(derive(self.seed, "random", linear.name))
        score = torch.rand(weight.shape, generator=generator, dtype=torch.float32)
        return ranked(weight, score, self.options.group)
