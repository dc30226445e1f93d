"""MLPs that run with the neurons a prompt has used most: small dense products, for any device.

The linears of an MLP have their forwards shadowed, and what stands between them works on each neuron by itself, so an
architecture's own code runs on a few neurons as it does on all. While a prompt is read everything is dense and `down`
notes what it multiplies; with the first token behind it, the rows and columns of the chosen neurons are copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsekit.models.gates import Always, Gate, OfPrompt, Scope, most_used, prompt_use
from sparsekit.models.roles import family
from sparsekit.models.sites import neuron_makers
from sparsekit.models.structure import inside_block

if TYPE_CHECKING:
    from collections.abc import Mapping

Multiply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""x [..., in], W [out, in], bias [out] or None -> [..., out]."""


class PromptScope(Scope):
    """What of a text the model is reading, where neurons are chosen by the prompt.

    Attributes:
        fresh: The text begins here.
        prompt: Leading tokens of this pass that are the prompt, or more of it.
        behind: All that is read follows the prompt, and is to run with the chosen neurons.
        generating: The call comes from `generate`; the rows of the batch share one choice.
    """

    def __init__(self, dense: int = 0) -> None:
        super().__init__(dense)
        self.fresh = True
        self.prompt = 0
        self.behind = False
        self.generating = False


class _Used(threading.local):
    """What this thread's prompt has used of an MLP, and the weights chosen by it.

    Attributes:
        use, tokens: See `prompt_use`, for every row of the batch; None before any prompt.
        weights: For each linear of the MLP, its weight and bias; None until they are asked for.
    """

    def __init__(self) -> None:
        self.use: Tensor | None = None
        self.tokens: Tensor | None = None
        self.weights: list[tuple[Tensor, Tensor | None]] | None = None


class Neurons:
    """The neurons of one MLP.

    Attributes:
        down: The linear that reads them.
        makers: The linears that make them, and how many rows each has for a neuron.
        count: How many are kept.
    """

    def __init__(self, down: nn.Module, makers: tuple[tuple[nn.Module, int], ...], count: int) -> None:
        self.down: Any = down
        self.makers = makers
        self.count = count
        self._used = _Used()

    def forget(self) -> None:
        """A new text begins."""
        used = self._used
        used.use = used.tokens = used.weights = None

    def note(self, z: Tensor, real: Tensor | None) -> None:
        """Add a prompt, or more of it, `z: [texts, tokens, neurons]`; `real`: see `prompt_use`."""
        used = self._used
        use, tokens = prompt_use(z, real)
        if used.use is not None and used.tokens is not None:
            use, tokens = used.use + use, used.tokens + tokens
        used.use, used.tokens, used.weights = use, tokens, None

    def chosen(self) -> Tensor | None:
        """Return the neurons that all texts of the batch together use most, ascending; None without a prompt.

        A single token is none: it says what it uses itself, and little of what comes.
        """
        use, tokens = self._used.use, self._used.tokens
        if use is None or tokens is None or int(tokens.max()) < 2:
            return None
        return most_used((use / tokens.clamp_min(1)[:, None]).sqrt().sum(dim=0), self.count)

    def weights(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """Return weight and bias of the makers, then of `down`, for the chosen neurons; None without a prompt."""
        used = self._used
        if used.weights is None and (chosen := self.chosen()) is not None:
            with torch.inference_mode(False), torch.no_grad():
                used.weights = list(self._cut(chosen.clone()))
        return used.weights

    def _cut(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        width = int(self.down.nx if isinstance(self.down, Conv1D) else self.down.in_features)
        for maker, parts in self.makers:
            rows = torch.cat([chosen + part * width for part in range(parts)])
            bias: Any = maker.bias
            yield _weight(maker).index_select(0, rows), None if bias is None else bias.index_select(0, rows)
        yield _weight(self.down).index_select(1, chosen).contiguous(), self.down.bias


class _Shared(Gate):
    """The rule by what all texts of a batch together use."""

    def __init__(self, neurons: Neurons) -> None:
        self.neurons = neurons

    def keep(self, x: Tensor) -> Tensor:
        """Return that all are kept: there is no prompt."""
        return torch.ones_like(x, dtype=torch.bool)

    def behind(self, prompt: Tensor, real: Tensor | None = None) -> Gate:
        """Return the rule by the prompt that has been noted."""
        chosen = self.neurons.chosen()
        if chosen is None:
            return self
        kept = torch.zeros(prompt.shape[-1], dtype=torch.bool, device=prompt.device)
        kept[chosen] = True
        return Always(kept)


class FewRows:
    """The forward of a linear that makes neurons: behind a prompt only the chosen ones."""

    def __init__(self, module: nn.Module, place: int, neurons: Neurons, scope: PromptScope, multiply: Multiply) -> None:
        self.inner: Callable[..., Tensor] = module.forward
        self.place, self.neurons, self.scope, self.multiply = place, neurons, scope, multiply

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer."""
        weights = self.neurons.weights() if self.scope.behind else None
        return self.inner(x) if weights is None else self.multiply(x, *weights[self.place])


class FewColumns:
    """The forward of the linear that reads neurons: it notes what a prompt uses, then reads the chosen ones."""

    def __init__(self, neurons: Neurons, scope: PromptScope, multiply: Multiply) -> None:
        self.inner: Callable[..., Tensor] = neurons.down.forward
        self.rules: dict[bool, Gate] = {True: _Shared(neurons), False: OfPrompt(neurons.count)}
        self.neurons, self.scope, self.multiply = neurons, scope, multiply

    def __call__(self, z: Tensor) -> Tensor:
        """Run the layer on `z: [texts, tokens, neurons]` or [texts * tokens, neurons]."""
        scope = self.scope
        if scope.behind:
            weights = self.neurons.weights()
            return self.inner(z) if weights is None else self.multiply(z, *weights[-1])
        if scope.fresh:
            self.neurons.forget()
        if scope.prompt:
            first = z.reshape(scope.texts, -1, z.shape[-1])[:, : scope.prompt]
            self.neurons.note(first, None if scope.real is None else scope.real[:, : scope.prompt])
        return self.inner(scope.thinned(self.rules[scope.generating], z))


def few_neurons(
    model: Any, gates: Mapping[str, OfPrompt], scope: PromptScope, multiply: Multiply
) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Yield the linears of a model's MLPs and the forwards that run them with the neurons a prompt has chosen.

    Args:
        model: A transformers model; linears may be packed.
        gates: Name of a down projection -> its rule; checked by `fitting_module`.
        scope: What of a text the pass at hand reads.
        multiply: Computes the small products.
    """
    for name, gate in gates.items():
        found = inside_block(model, name)
        assert found is not None  # noqa: S101  (a place that fits is in a block)
        block, inside = found
        makers = tuple((block.get_submodule(maker), rows) for maker, rows in neuron_makers(family(model), inside))
        neurons = Neurons(model.get_submodule(name), makers, gate.count)
        for place, (maker, _) in enumerate(makers):
            yield maker, FewRows(maker, place, neurons, scope, multiply)
        yield neurons.down, FewColumns(neurons, scope, multiply)


def real_tokens(mask: Any, seen: int, tokens: int) -> Tensor | None:
    """Return which tokens of a pass are no padding, [texts, tokens] bool; None: all of them, as far as can be told.

    Args:
        mask: What the model got as attention_mask: [texts, seen + tokens]; or prepared, [texts, 1, tokens, keys] bool
            or added to scores, or one such for each kind of layer. A token that may not see itself is padding.
        seen: Tokens of the cache.
        tokens: Tokens of the pass.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        mask = mask[:, 0, :, seen : seen + tokens].diagonal(dim1=-2, dim2=-1)
        mask = mask == 0 if mask.is_floating_point() else mask
    else:
        mask = mask[:, seen : seen + tokens]
    real = mask.to(torch.bool)
    return None if real.shape[1] != tokens or bool(real.all()) else real


def _weight(module: Any) -> Tensor:
    """Return the weight of a layer, [out, in]; a packed one is unpacked."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) or getattr(module, "transposed", False) else weight
