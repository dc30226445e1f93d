"""Gates in a loaded model: what is thinned out when, and switching it off.

A forward that scores a text thins out all but its first tokens. In `generate`, the prompt is dense unless the
checkpoint says otherwise, and every token after it is thinned out. Which of the two it is, is seen from `generate`
itself: both call the same forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsekit.checkpoint.source import SIDECAR
from sparsekit.errors import UsageError
from sparsekit.memory import leave_files, release_freed
from sparsekit.models.expert_gates import install_expert_gate
from sparsekit.models.gate_files import GateFile, read_gate_file
from sparsekit.models.gate_fit import fitting_module
from sparsekit.models.gates import Gated, Scope, install
from sparsekit.models.linears import is_experts
from sparsekit.runtime import native
from sparsekit.runtime.columns import skipping
from sparsekit.runtime.dense import use_streaming

_ATTRIBUTE = "sparsekit_gates"


class ModelScope(Scope):
    """What of the call at hand is thinned out.

    Attributes:
        generating: The call comes from `generate`.
        paused: The full model computes.
    """

    def __init__(self, dense: int) -> None:
        super().__init__(dense)
        self.generating = False
        self.paused = False


@dataclass
class Attached:
    """The gates of a model.

    Attributes:
        file: What was read.
        scope: Shared by all gates.
        kernels: Names of signals whose products skip what is dropped, rather than multiply zeros.
        undo: Takes the gates away again.
    """

    file: GateFile
    scope: ModelScope
    kernels: frozenset[str]
    undo: list[Callable[[], None]]


def attach_folder(model: Any, folder: Path, *, kernels: bool) -> bool:
    """Attach the gates that lie beside a model's weights; return whether there are any.

    Args:
        model: A transformers model, loaded from `folder`.
        folder: Local folder of the checkpoint.
        kernels: Skip what is dropped where a kernel for that is at hand; else it is multiplied as zeros. The result
            is the same up to rounding.

    Raises:
        CheckpointError: The file is damaged, or belongs to another model.
    """
    file = read_gate_file(folder)
    if file is None:
        return False
    attach(model, file, kernels=kernels, where=str(folder / SIDECAR))
    return True


def attach(model: Any, file: GateFile, *, kernels: bool, where: str = "gates") -> None:
    """Attach gates to a transformers model in place; see `attach_folder`.

    Raises:
        CheckpointError: A signal that the model does not have or that is never thinned out, or of another width.
        UsageError: It has gates already.
    """
    if attached(model):
        raise UsageError("the model has gates already", hint="Load it again, or call detach first.")
    scope = ModelScope(file.dense_tokens)
    modules = {name: fitting_module(model, name, placed, where) for name, placed in file.gates.items()}
    experts = {name: module for name, module in modules.items() if is_experts(module)}
    state = Attached(file, scope, frozenset(), [])
    if kernels and native.available():
        use_streaming(model)
        plain = {name: module for name, module in modules.items() if name not in experts}
        found = list(skipping(model, plain, file, scope))
        state.kernels = frozenset(each.signal for each in found)
        state.undo += [install(each.module, each.forward) for each in found]
        leave_files(model)
        release_freed()
    for name, module in modules.items():
        if name in experts:
            parameter = name.rpartition(".")[2]
            state.undo.append(install_expert_gate(module, parameter, file.gates[name], scope))
        elif name not in state.kernels:
            state.undo.append(install(module, Gated(module, file.gates[name], scope)))
    _follow_calls(model, state)
    setattr(model, _ATTRIBUTE, state)


def attached(model: Any) -> bool:
    """Return whether a model has gates."""
    return _state(model) is not None


def describe(model: Any) -> Attached | None:
    """Return the gates of a model, None without any."""
    return _state(model)


@contextmanager
def paused(model: Any) -> Iterator[None]:
    """Let the full model compute, in this thread; no error for a model without gates."""
    state = _state(model)
    if state is None:
        yield
        return
    before, state.scope.paused = state.scope.paused, True
    try:
        yield
    finally:
        state.scope.paused = before


def detach(model: Any) -> None:
    """Take the gates away."""
    state = _state(model)
    if state is not None:
        for undo in reversed(state.undo):
            undo()
        delattr(model, _ATTRIBUTE)


def _state(model: Any) -> Attached | None:
    found: Attached | None = model.__dict__.get(_ATTRIBUTE)
    return found


def _follow_calls(model: Any, state: Attached) -> None:
    """Have the scope know, at every call of the model, which tokens it gets."""
    scope, prefill_dense = state.scope, state.file.prefill == "dense"

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        texts, tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        past = kwargs.get("past_key_values")
        seen = 0 if past is None else int(past.get_seq_length())
        scope.texts = texts
        scope.dense = min(tokens, max(0, state.file.dense_tokens - seen))
        scope.off = scope.paused or scope.dense == tokens or (scope.generating and prefill_dense and tokens > 1)

    state.undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    generate = model.generate

    @functools.wraps(generate)
    def generating(*args: Any, **kwargs: Any) -> Any:
        outer, scope.generating = scope.generating, True
        try:
            return generate(*args, **kwargs)
        finally:
            scope.generating = outer

    model.generate = generating
    state.undo.append(functools.partial(model.__dict__.pop, "generate", None))
