"""A draft that leaves out attentions and MLPs of some blocks: what they would add to the residual stream is nothing.

**Source.** Xia et al. 2024, "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration", arXiv
2410.06916: the first and the last block always compute.

**Cost.** Nothing: a branch that is left out is not called, and neither is anything in it. Its block's norm is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.errors import UnsupportedFamily, UsageError
from sparsekit.lazy import torch
from sparsekit.models.roles import FamilySpec, Part, family
from sparsekit.models.structure import SHORTCUTS

if TYPE_CHECKING:
    from torch import Tensor, nn

Forward = Callable[..., Any]
PARTS: tuple[Part, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Skips:
    """Which branches are left out, by the numbers of their blocks, ascending."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of branches."""
        return len(self.attention) + len(self.mlp)

    def of(self, part: Part) -> tuple[int, ...]:
        """Return the blocks without that branch."""
        return self.attention if part == "attention" else self.mlp


class Skipper:
    """The branches of a model, and forwards that stand in for those that are left out."""

    def __init__(self, model: Any) -> None:
        """Find the branches of a transformers model.

        Raises:
            UnsupportedFamily: It is not known which modules they are, or their outputs are not simply added.
        """
        spec = family(model)
        blocks = _blocks(model, spec)
        if any(hasattr(block, SHORTCUTS) for block in blocks):
            raise UnsupportedFamily(
                f"{type(model).__name__} has shortcuts beside its branches: they cannot be left out",
                hint="Draft with the checkpoint that was sliced.",
            )
        self.blocks = len(blocks)
        self._model = model
        self._silent: dict[tuple[Part, int], list[tuple[nn.Module, Forward]]] = {}
        self._find(blocks, spec)

    def skipping(self, skips: Skips) -> Callable[[], AbstractContextManager[None]]:
        """Return what opens a context in which the model computes without some branches.

        Raises:
            UsageError: The first or last block, or one that there is not.
        """
        pairs: list[tuple[nn.Module, Forward]] = []
        for part in PARTS:
            for block in skips.of(part):
                if not 0 < block < self.blocks - 1:
                    raise UsageError(
                        f"block {block}: its {part} cannot be left out; got {self.blocks} blocks, of which the first "
                        f"and the last always compute"
                    )
                pairs += self._silent[part, block]

        return lambda: _shadowed(pairs)

    def cost(self, skips: Skips) -> float:
        """Return the bytes of weights that a token takes without these branches, as a share of all it takes."""
        unread = self._model.get_input_embeddings()
        if getattr(self._model.get_output_embeddings(), "weight", None) is getattr(unread, "weight", None):
            unread = None  # tied: a token reads one row of it, and the head all of it
        whole = _bytes(self._model) - (0 if unread is None else _bytes(unread))
        left_out = sum(
            _bytes(module) for part in PARTS for block in skips.of(part) for module, _ in self._silent[part, block]
        )
        return 1 - left_out / whole

    def _find(self, blocks: Sequence[nn.Module], spec: FamilySpec) -> None:
        """Note the modules of every branch, and what each returns: a tensor, or a tuple that starts with one."""
        modules = {(part, index): _modules(block, spec, part) for index, block in enumerate(blocks) for part in PARTS}
        widths: dict[int, int] = {}

        def note(module: nn.Module, args: Any, out: Any) -> None:
            widths[id(module)] = len(out) if isinstance(out, tuple) else 0

        hooks = [module.register_forward_hook(note) for found in modules.values() for module in found]
        try:
            with torch.inference_mode():
                self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for place, (*inner, last) in modules.items():
            pairs: list[tuple[nn.Module, Forward]] = [(module, _hand_on) for module in inner]
            self._silent[place] = [*pairs, (last, _nothing(last, widths[id(last)]))]


def _blocks(model: Any, spec: FamilySpec) -> list[nn.Module]:
    """Return the blocks, found by their attention: packed ones show no weights to find them by.

    Raises:
        UnsupportedFamily: There are none.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and all(_has(block, spec) for block in module):
            return list(module)
    raise UnsupportedFamily(f"{type(model).__name__} has no blocks with {spec.attention.output}")


def _has(block: nn.Module, spec: FamilySpec) -> bool:
    return any(name == spec.attention.output for name, _ in block.named_modules())


def _modules(block: nn.Module, spec: FamilySpec, part: Part) -> list[nn.Module]:
    """Return the one module that is a branch, or its linears where the block itself calls them."""
    if part == "attention":
        return [block.get_submodule(spec.attention.output.rpartition(".")[0])]
    linears = [name for mlp in spec.mlps for name in (mlp.gate, mlp.up, mlp.down) if name]
    tops = dict.fromkeys(top for name in linears for top in (name.partition(".")[0],) if hasattr(block, top))
    return [block.get_submodule(top) for top in tops]


def _bytes(module: nn.Module) -> int:
    """Return the size of all parameters and buffers of a module."""
    return sum(tensor.nbytes for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


def _hand_on(hidden: Tensor) -> Tensor:
    """Stand in for a linear whose outputs end in one that gives nothing."""
    return hidden


def _nothing(module: nn.Module, width: int) -> Forward:
    """Return a forward that adds nothing to the stream and computes nothing.

    Args:
        module: What it stands in for.
        width: Length of the tuple that the module returns; 0: a tensor.
    """
    names = list(inspect.signature(module.forward).parameters)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # Where a branch adds its own output to the stream, it gets the stream as `residual`.
        stream = given.get("residual")
        out = torch.zeros_like(given[names[0]]) if stream is None else stream
        return (out, *[None] * (width - 1)) if width else out

    return forward


@contextmanager
def _shadowed(pairs: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Let forwards stand in for those of modules."""
    before = [module.__dict__.get("forward") for module, _ in pairs]
    try:
        for module, forward in pairs:
            module.__dict__["forward"] = forward  # shadows the method
        yield
    finally:
        for (module, _), own in zip(pairs, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
