"""ECoFLaP: blocks whose weights move the loss more keep more, from forward passes alone.

What it does: per linear and sample |L(w + e z) - L(w - e z)| / 2e with Gaussian z; a block's score is the sum over its
    linears, mean over samples; kept weights per block in proportion to it, no block sparser than the average by more
    than `margin`, what that takes is spread over the others. Inside a block all linears have one density.
Source: Sung et al. 2024, "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models", arXiv
    2310.02998, section 3.2; zeroth-order estimate as in Malladi et al. 2023, "MeZO", arXiv 2305.17333.
Shapes: linears, losses -> kept counts.
Cost: the whole model in float32 in memory; 2 x linears x samples losses, each over half of the blocks on average.
Deviations: z comes from (seed, linear, sample) and is never stored; weights are put back bit for bit instead of by
    adding what was subtracted; the limits hold exactly. The standard error of each score is reported: the noise is
    large.
Numbers: on a quadratic loss the ranking of the scores is the analytic one (tests/oracle/test_allocators.py).
"""

from __future__ import annotations

import math
import statistics

from pydantic import Field

from sparsekit.budget import above_zero, distribute
from sparsekit.contracts import AllocationContext, Allocator, LinearInfo, MethodOptions, Probes, WholeModel
from sparsekit.lazy import torch
from sparsekit.rng import derive


class EcoflapOptions(MethodOptions):
    """Options of `ecoflap`."""

    samples: int = Field(default=32, ge=2, description="calibration samples that losses are measured on")
    sequence_length: int = Field(default=128, ge=8, description="tokens of each sample")
    step: float = Field(default=1e-3, gt=0, description="e, size of the change of the weights")
    margin: float = Field(
        default=0.1, gt=0, le=1, description="no block's sparsity is above the average by more than this"
    )


class Ecoflap(Allocator[EcoflapOptions]):
    """Kept weights of a block in proportion to how the loss answers to a random change of its weights."""

    options_type = EcoflapOptions
    looks = True

    def probes(self) -> Probes:
        """Return the part of the calibration text that losses are measured on."""
        return Probes(self.options.samples, self.options.sequence_length)

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Probe every linear, sum per block, water-fill."""
        answers: dict[int, list[float]] = {}  # block -> per sample
        numel: dict[int, int] = {}
        with context.whole() as model:
            for linear in context.linears:
                sums = answers.setdefault(linear.block, [0.0] * self.options.samples)
                numel[linear.block] = numel.get(linear.block, 0) + linear.numel
                for sample in range(self.options.samples):
                    sums[sample] += self._answer(model, linear, sample)
        score = {block: statistics.fmean(values) for block, values in answers.items()}
        root = math.sqrt(self.options.samples)
        context.facts["score"] = {str(block): value for block, value in score.items()}
        context.facts["standard_error"] = {str(b): statistics.stdev(values) / root for b, values in answers.items()}
        share = above_zero({linear.name: score[linear.block] / numel[linear.block] for linear in context.linears})
        least = max(budget / sum(numel.values()) - self.options.margin, 0.0)
        return distribute(context.linears, share, budget, context.pattern.unit, min_density=least)

    def _answer(self, model: WholeModel, linear: LinearInfo, sample: int) -> float:
        """Return |L(w + e z) - L(w - e z)| / 2e."""
        weight = model.weight(linear)
        generator = torch.Generator().manual_seed(derive(self.seed, "ecoflap", linear.name, str(sample)))
        change = torch.randn(weight.shape, generator=generator).mul_(self.options.step)
        losses = [model.loss(linear, weight + sign * change, sample) for sign in (1, -1)]
        return abs(losses[0] - losses[1]) / (2 * self.options.step)
