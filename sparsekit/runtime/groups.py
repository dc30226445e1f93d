"""Layers that multiply the same input one after the other (query, key and value; gate and up) become one native call.

No table of names says which: the calls do. The first layer that gets a tensor leads; one that gets the very same tensor
next is remembered as its follower. From then on the leader computes the products of all and leaves those of its
followers behind. A follower takes what was left only if its input *is* the leader's, unchanged since, and its own
weight and bias are those that were multiplied; otherwise it computes by itself. So a wrong guess costs time, once (that
leader never guesses again), and never correctness.

Every thread remembers its own last call. Inputs and layers are remembered weakly; results that are left behind are
dropped at the thread's next product that is not theirs.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sparsekit.runtime import ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn import Parameter

LARGEST = 3
"""Most layers in one call."""
FEW_TOKENS = 16
"""With more tokens the calls are long, and one for all saves nothing."""


class Layer(Protocol):
    """What a grouped layer has.

    Attributes:
        in_features, out_features: Shape of the weight, [out, in].
        followers: Weak references to the layers it computes as well; None: it guessed wrong and leads no more.
    """

    in_features: int
    out_features: int
    followers: tuple[weakref.ref[Layer], ...] | None
    # "packed" and "bias" are read from here: attributes of modules are slow.
    _buffers: dict[str, Tensor | None]
    _parameters: dict[str, Parameter | None]


_Left = tuple["weakref.ref[Layer]", Tensor, "Tensor | None", Tensor]
"""A product that waits for its layer: the layer, its packed weight, its bias, the product."""


class _Calls(threading.local):
    """The last product of this thread.

    Attributes:
        x, version: Its input and how often that had been written to.
        leader: The first layer that got it.
        left: What the leader left behind and nobody has taken yet, the next one last.
    """

    def __init__(self) -> None:
        self.x: Callable[[], Tensor | None] = lambda: None
        self.version = 0
        self.leader: Callable[[], Layer | None] = lambda: None
        self.left: list[_Left] = []


_calls = _Calls()


def groupable(layer: Layer, x: Tensor) -> bool:
    """Return whether a layer's product with `x: [..., in]` may be part of a group.

    Only if it has a weight and where nothing looks on: no gradient, no subclass of Tensor; and only where writes to x
    are counted.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.numel() <= FEW_TOKENS * layer.in_features
        and not x.is_inference()
        and layer._buffers["packed"] is not None
    )


def product(layer: Layer, x: Tensor) -> Tensor:
    """Return the product of a layer, alone or out of a group. Not for tracing.

    Args:
        layer: The layer that was called, `groupable` with
        x: its input.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
    """
    calls, version = _calls, x._version
    if calls.x() is x and calls.version == version:
        if calls.left:
            owner, packed, bias, result = calls.left.pop()
            if owner() is layer and packed is layer._buffers["packed"] and bias is layer._parameters["bias"]:
                return result
            _wrong_guess(calls)
        elif _joins(layer, calls.leader()):
            return _alone(layer, x)
    elif calls.left:
        _wrong_guess(calls)
    calls.x, calls.version, calls.leader = weakref.ref(x), version, weakref.ref(layer)
    return _lead(layer, layer.followers, x, calls) if layer.followers else _alone(layer, x)


def _alone(layer: Layer, x: Tensor) -> Tensor:
    packed: Any = layer._buffers["packed"]  # groupable: not None
    return ops.linear(x, packed, layer._parameters["bias"], layer.out_features)


def _joins(layer: Layer, leader: Layer | None) -> bool:
    """Return whether a layer follows a leader from now on."""
    if leader is None or leader is layer or leader.followers is None or len(leader.followers) == LARGEST - 1:
        return False
    leader.followers = (*leader.followers, weakref.ref(layer))
    return True


def _lead(layer: Layer, followers: tuple[weakref.ref[Layer], ...], x: Tensor, calls: _Calls) -> Tensor:
    """Compute the products of a layer and its followers; return its own, leave the others."""
    arguments: list[Any] = [layer._buffers["packed"], layer._parameters["bias"], layer.out_features]
    for reference in followers:
        follower = reference()
        packed = None if follower is None else follower._buffers["packed"]
        if follower is None or packed is None or packed.is_meta:  # replaced, or not in memory
            layer.followers = ()
            return _alone(layer, x)
        arguments += (packed, follower._parameters["bias"], follower.out_features)
    try:
        results = ops.linear_group(x, *arguments)
    except RuntimeError:  # one of them does not fit x; its own call says so
        layer.followers = None
        return _alone(layer, x)
    calls.left = [
        (followers[i - 1], arguments[3 * i], arguments[3 * i + 1], results[i]) for i in range(len(followers), 0, -1)
    ]
    return results[0]


def _wrong_guess(calls: _Calls) -> None:
    calls.left = []
    leader = calls.leader()
    if leader is not None:
        leader.followers = None
