"""Gates in a loaded model: what is thinned out when, and switching it off.

A forward that scores a text thins out all but its first tokens. In `generate`, the prompt is dense unless the
checkpoint says otherwise, and every token after it is thinned out. Which of the two it is, is seen from `generate`
itself: both call the same forward.

Where neurons are chosen by the prompt, that is what `generate` was given, and of a text that is scored its first half.
A prompt that is read in parts is one prompt; an empty cache begins another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.functional import linear

from sparsekit.checkpoint.source import SIDECAR
from sparsekit.errors import UsageError
from sparsekit.memory import leave_files, release_freed
from sparsekit.models.expert_gates import install_expert_gate
from sparsekit.models.gate_files import GateFile, prompt_of, read_gate_file
from sparsekit.models.gate_fit import fitting_module
from sparsekit.models.gates import Gated, OfPrompt, install
from sparsekit.models.linears import is_experts
from sparsekit.runtime import native
from sparsekit.runtime.columns import skipping
from sparsekit.runtime.dense import product, use_streaming
from sparsekit.runtime.neurons import PromptScope, few_neurons, real_tokens

_ATTRIBUTE = "sparsekit_gates"


class ModelScope(PromptScope):
    """What of the call at hand is thinned out.

    Attributes:
        given: Tokens that `generate` was given; None: not known.
        paused: The full model computes.
    """

    def __init__(self, dense: int) -> None:
        super().__init__(dense)
        self.given: int | None = None
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
    native_too = kernels and native.available()
    if native_too:
        use_streaming(model)
    by_prompt = {name: placed.gate for name, placed in file.gates.items() if isinstance(placed.gate, OfPrompt)}
    if by_prompt:
        small = few_neurons(model, by_prompt, scope, product if native_too else linear)
        state.kernels = frozenset(by_prompt)
        state.undo += [install(module, forward) for module, forward in small]
    elif native_too:
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


def prompt_tokens(model: Any, tokens: int) -> int:
    """Return how many leading tokens of a text that is scored are a prompt, and not to be scored; 0 for most models."""
    state = _state(model)
    return prompt_of(tokens) if state is not None and state.file.by_prompt else 0


def _follow_calls(model: Any, state: Attached) -> None:
    """Have the scope know, at every call of the model, which tokens it gets."""
    scope, prefill_dense, by_prompt = state.scope, state.file.prefill == "dense", state.file.by_prompt

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        texts, tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        past = kwargs.get("past_key_values")
        seen = 0 if past is None else int(past.get_seq_length())
        scope.texts = texts
        if by_prompt:
            scope.fresh = seen == 0
            if scope.generating:
                end = scope.given or (seen + tokens if tokens > 1 else 0)
                scope.prompt = max(0, min(end - seen, tokens)) if scope.fresh or not scope.paused else 0
            else:
                scope.prompt = prompt_of(tokens) if scope.fresh else 0
            scope.behind = not (scope.paused or scope.fresh or scope.prompt)
            scope.real = real_tokens(kwargs.get("attention_mask"), seen, tokens)
            scope.dense, scope.off = scope.prompt, scope.paused or scope.prompt == tokens
            return
        scope.dense = min(tokens, max(0, state.file.dense_tokens - seen))
        scope.off = scope.paused or scope.dense == tokens or (scope.generating and prefill_dense and tokens > 1)

    state.undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    generate = model.generate

    @functools.wraps(generate)
    def generating(*args: Any, **kwargs: Any) -> Any:
        outer = scope.generating, scope.given
        scope.generating, scope.given = True, _given(args, kwargs)
        try:
            return generate(*args, **kwargs)
        finally:
            scope.generating, scope.given = outer

    model.generate = generating
    state.undo.append(functools.partial(model.__dict__.pop, "generate", None))


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return how many tokens of each text `generate` was given; None: not known."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    found = next((value for value in (*args[:1], *named) if value is not None), None)
    return None if found is None else int(found.shape[1])
