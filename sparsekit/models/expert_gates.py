"""Gates inside a mixture of experts, whose products no module of their own makes.

The module that holds all experts runs them one after the other, as transformers' plain implementation does, with its
signals thinned out on the way: what enters every expert, and what its down projection multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsekit.lazy import torch
from sparsekit.models.gates import Gate, Gated, Placed, Scope, Threshold, TopK, install
from sparsekit.models.linears import projections
from sparsekit.models.sites import Place

if TYPE_CHECKING:
    from torch import Tensor, nn


def of_expert(gate: Gate, expert: int) -> Gate:
    """Return the rule of one expert; what has no row for each is that of all."""
    match gate:
        case Threshold(t) if t.dim() == 2:
            return Threshold(t[expert])
        case TopK(_, w) if w.dim() == 2:
            return replace(gate, w=w[expert])
    return gate


class GatedExperts:
    """The forward of a module that holds all experts of a layer, with gates at their projections."""

    def __init__(self, module: nn.Module, scope: Scope) -> None:
        self.module: Any = module
        self.inner: Callable[..., Tensor] = module.forward
        self.scope = scope
        self.gates: dict[str, Gate] = {}

    def thinned(self, parameter: str, expert: int, x: Tensor, dense: Tensor) -> Tensor:
        """Return what a projection of an expert multiplies of `x: [tokens, in]`; `dense: [tokens]` tokens stay."""
        gate = self.gates.get(parameter)
        if gate is None or self.scope.off:
            return x
        return torch.where(dense[:, None], x, of_expert(gate, expert)(x))

    def entering(self, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        """Return what the first projection of an expert multiplies, for tokens of a single text by number."""
        return self.thinned(projections(self.module)[0], expert, x, tokens < self.scope.dense)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighed sum of the experts' outputs, [..., hidden], for tokens in the order of their texts.

        An index that is no expert's stands for nothing.
        """
        if self.scope.off:
            return self.inner(hidden_states, top_k_index, top_k_weights)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        result = torch.zeros_like(hidden)
        length = max(len(hidden) // max(self.scope.texts, 1), 1)
        leading = torch.arange(len(hidden), device=hidden.device) % length < self.scope.dense
        count = self.module.get_parameter(projections(self.module)[0]).shape[0]
        chosen: list[int] = sorted(set(top_k_index.reshape(-1).tolist()))
        for expert in chosen:
            if not 0 <= expert < count:
                continue
            tokens, choice = torch.where(top_k_index == expert)
            out = self.expert(expert, hidden[tokens], leading[tokens])
            result.index_add_(0, tokens, (out * top_k_weights[tokens, choice, None]).to(result.dtype))
        return result.reshape(hidden_states.shape)

    def expert(self, expert: int, x: Tensor, dense: Tensor) -> Tensor:
        """Return an expert's outputs for its tokens, [tokens, hidden]."""
        *inner, down = projections(self.module)
        middle = self.project(inner[0], expert, self.thinned(inner[0], expert, x, dense))
        gated = bool(getattr(self.module, "has_gate", True))
        middle = self.module._apply_gate(middle) if gated else self.module.act_fn(middle)
        return self.project(down, expert, self.thinned(down, expert, middle, dense))

    def project(self, parameter: str, expert: int, x: Tensor) -> Tensor:
        """Return `x W^T + b` of an expert's projection."""
        weight = self.module.get_parameter(parameter)[expert]
        y: Tensor = x @ (weight if getattr(self.module, "is_transposed", False) else weight.T)
        return (
            y + self.module.get_parameter(f"{parameter}_bias")[expert] if getattr(self.module, "has_bias", False) else y
        )


def place_at(place: Place, placed: Placed, scope: Scope) -> Callable[[], None]:
    """Put a gate at its place; return what undoes it."""
    if place.experts is not None:
        return install_expert_gate(place.module, place.experts, placed, scope)
    return install(place.module, Gated(place.module, placed, scope))


def install_expert_gate(module: nn.Module, parameter: str, placed: Placed, scope: Scope) -> Callable[[], None]:
    """Put a gate in front of a projection of all experts; return what undoes it."""
    present = module.__dict__.get("forward")
    experts = present if isinstance(present, GatedExperts) else GatedExperts(module, scope)
    experts.gates[parameter] = placed.gate
    module.__dict__["forward"] = experts  # shadows the method

    def undo() -> None:
        experts.gates.pop(parameter, None)
        if not experts.gates:
            module.__dict__.pop("forward", None)

    return undo
