"""Every weight matrix of a block as a linear [out, in], however the architecture stores it.

`nn.Linear` holds [out, in]; GPT-2's Conv1D holds [in, out]; a mixture of experts holds 3-D parameters
[experts, out, in] (or [experts, in, out]) that no module of its own represents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.contracts import LinearInfo
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


@dataclass
class Linear:
    """One weight matrix inside a loaded block.

    Attributes:
        info: Name and shape.
        module: The module that owns the parameter and whose input is captured.
        parameter: Name of the parameter inside `module`.
        expert: Index into a 3-D expert parameter, else None.
        transposed: True when the parameter is stored [in, out].
    """

    info: LinearInfo
    module: nn.Module
    parameter: str
    expert: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """Dotted name of the linear."""
        return self.info.name

    @property
    def parameter_name(self) -> str:
        """The model's name of the parameter that holds the weight."""
        path = self.name if self.expert is None else self.name.rsplit(".", 2)[0]
        return f"{path}.{self.parameter}"

    def weight(self) -> Tensor:
        """Return the stored weight as a view [out, in]."""
        return self.view(self.module.get_parameter(self.parameter).data)

    def view(self, stored: Tensor) -> Tensor:
        """Return this linear's part of a tensor that is shaped as the parameter, such as its gradient, [out, in]."""
        if self.expert is not None:
            stored = stored[self.expert]
        return stored.T if self.transposed else stored

    def replace(self, weight: Tensor) -> Tensor:
        """Store `weight: [out, in]`, cast to the parameter's dtype; return what was stored, [out, in]."""
        parameter = self.module.get_parameter(self.parameter)
        value = weight.to(parameter.dtype)
        stored = value.T.contiguous() if self.transposed else value
        if self.expert is None:
            parameter.data = stored
        else:
            parameter.data[self.expert].copy_(stored)
        return value

    def bias(self) -> Tensor | None:
        """Return the stored bias as a view [out], None without one."""
        stored = getattr(self.module, self._bias, None)
        if stored is None:
            return None
        whole: Tensor = stored.data
        return whole if self.expert is None else whole[self.expert]

    def replace_bias(self, bias: Tensor) -> str:
        """Store `bias: [out]` in place of the one that is there; return the model's name of its parameter."""
        parameter = self.module.get_parameter(self._bias)
        if self.expert is None:
            parameter.data = bias
        else:
            parameter.data[self.expert].copy_(bias)
        return self.bias_name

    @property
    def bias_name(self) -> str:
        """The model's name of the parameter that holds the bias, if there is one."""
        return f"{self.parameter_name.removesuffix(self.parameter)}{self._bias}"

    @property
    def _bias(self) -> str:
        return "bias" if self.expert is None else f"{self.parameter}_bias"


Tap = Callable[[str, "Tensor"], None]
"""Receives (linear name, its input [..., in]) whenever a tapped linear is about to run."""


def find_linears(block: nn.Module, prefix: str, index: int) -> list[Linear]:
    """Return all linears of a block in module order; routers and single-output gates are not among them.

    Args:
        block: A decoder layer; its parameters may be on meta.
        prefix: Dotted name of the block, such as `model.layers.3`.
        index: Number of the block.
    """
    from transformers.pytorch_utils import Conv1D

    found: list[Linear] = []
    experts = {name: module for name, module in block.named_modules() if is_experts(module)}
    for name, module in block.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        if name in experts:
            found.extend(_expert_linears(module, full, index))
        elif isinstance(module, (torch.nn.Linear, Conv1D)) and not _is_router(name, module, experts):
            transposed = isinstance(module, Conv1D)
            shape = module.weight.shape[::-1] if transposed else module.weight.shape
            info = LinearInfo(full, index, int(shape[0]), int(shape[1]))
            found.append(Linear(info, module, "weight", transposed=transposed))
    return found


def routers(block: nn.Module) -> set[str]:
    """Return the parameter names (relative to the block) that choose experts: never targets, never counted."""
    experts = {name: module for name, module in block.named_modules() if is_experts(module)}
    return {
        f"{name}.weight"
        for name, module in block.named_modules()
        if hasattr(module, "weight") and _is_router(name, module, experts)
    }


def is_experts(module: nn.Module) -> bool:
    """Tell a module that holds all experts of a layer in 3-D parameters (transformers' experts interface)."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, torch.nn.Parameter) and down.ndim == 3 and hasattr(module, "_apply_gate")


def _is_router(name: str, module: nn.Module, experts: dict[str, nn.Module]) -> bool:
    """A router scores experts: it sits beside them and has one output per expert, or one output to gate them all."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return False
    parent = name.rpartition(".")[0]
    beside = [e for path, e in experts.items() if path.rpartition(".")[0] == parent]
    return any(weight.shape[0] in (1, int(e.get_parameter("down_proj").shape[0])) for e in beside)


def _expert_linears(module: nn.Module, prefix: str, index: int) -> Iterator[Linear]:
    transposed = bool(getattr(module, "is_transposed", False))
    for parameter in projections(module):
        count, *shape = module.get_parameter(parameter).shape
        rows, columns = shape[::-1] if transposed else shape
        for expert in range(count):
            info = LinearInfo(f"{prefix}.{expert}.{parameter}", index, int(rows), int(columns))
            yield Linear(info, module, parameter, expert=expert, transposed=transposed)


def projections(module: nn.Module) -> list[str]:
    """Return the parameters of a module of experts that are projections, in the order they multiply."""
    names = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and name.endswith("_proj")]
    return sorted(names, key=lambda name: name == "down_proj")  # inputs before outputs


def tap_inputs(linears: Sequence[Linear], tap: Tap) -> list[RemovableHandle]:
    """Install hooks that hand every linear's input to `tap`; remove the returned handles afterwards."""
    handles: list[RemovableHandle] = []
    experts: dict[int, list[Linear]] = {}
    for linear in linears:
        if linear.expert is None:
            handles.append(linear.module.register_forward_pre_hook(_module_hook(linear.name, tap)))
        else:
            experts.setdefault(id(linear.module), []).append(linear)
    handles += [group[0].module.register_forward_pre_hook(_experts_hook(group, tap)) for group in experts.values()]
    return handles


def _module_hook(name: str, tap: Tap) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    # A pre-hook must return None: anything else replaces the module's input.
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tap(name, args[0])

    return hook


def _experts_hook(group: Sequence[Linear], tap: Tap) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    wanted = {(linear.expert, linear.parameter): linear.name for linear in group}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]  # [tokens, in], [tokens, top_k]
        for expert in sorted({expert for expert, _ in wanted if expert is not None}):
            tokens = (chosen == expert).any(dim=-1).nonzero()[:, 0]
            x = hidden[tokens]  # [tokens of this expert, in]
            for parameter in projections(module):
                name = wanted.get((expert, parameter))
                if parameter == "down_proj":
                    x = _intermediate(module, expert, _entering(module, expert, x, tokens))  # [tokens, intermediate]
                if name is not None:
                    tap(name, x)

    return hook


def _entering(module: nn.Module, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
    """Return what an expert multiplies of its input; less than all of it where the module has gates."""
    entering = getattr(module.__dict__.get("forward"), "entering", None)
    found: Tensor = x if entering is None else entering(expert, x, tokens)
    return found


def _intermediate(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """Recompute the input of an expert's down projection; the fused implementations never expose it."""
    gated = bool(getattr(module, "has_gate", True))
    parameter = "gate_up_proj" if gated else "up_proj"
    weight = module.get_parameter(parameter)[expert]
    up = x @ (weight if getattr(module, "is_transposed", False) else weight.T)
    if getattr(module, "has_bias", False):
        up = up + module.get_parameter(f"{parameter}_bias")[expert]
    activation: Any = module._apply_gate if gated else module.act_fn
    result: Tensor = activation(up)
    return result
