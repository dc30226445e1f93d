"""GRIFFIN: neurons that the prompt uses least are left out behind it.

What it does: the prompt runs dense, and every MLP notes how much each of its neurons is used: s_j = |(z_tj / |z_t|)_t|,
    the norm over the prompt's tokens t of the neuron's share in the activations z_t = act(gate) * up, or act(up) where
    there is no gate. The neurons with the highest s_j make a small dense MLP, which runs for every token behind the
    prompt. Nothing is calibrated, and any device multiplies it: no kernel is needed.
Source: Dong et al. 2024, "Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation", arXiv 2404.01365
    (GRIFFIN; no relation to the recurrent model of that name).
Shapes: z [tokens, neurons] -> number of neurons kept per MLP.
Cost: none before the model runs. Behind a prompt a dense copy of the kept neurons' weights, beside the model (for
    packed weights too), until the next prompt.
Deviations: text that is scored has no prompt: its first half is taken for one, and only the second half is scored. The
    rows of a batch share one choice in generation: of the mean of s / sqrt(tokens of the row), padding left out. A
    prompt of a single token chooses nothing; what follows it is dense.
Numbers: Llama-2-7B, 50 %: within 1 point of dense on classification. SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Site, Stats

if TYPE_CHECKING:
    from torch import Tensor


class Griffin(ActivationCalibrator[MethodOptions]):
    """Neurons are chosen once for a prompt, and not by what the weights or other texts say."""

    kinds = frozenset({"neurons"})
    rule = "prompt"
    least_coverage = 0.2

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return None: all neurons count alike."""
        return None
