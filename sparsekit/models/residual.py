"""The residual stream of a model: where it is read, by what, and what writes to it.

A block reads the stream in front of its attention and in front of its MLP, each time through a norm, and adds what it
makes of it. Where both branches read the same stream there is one place instead of two. Behind the last block the head
reads it, through the final norm. Which modules these are follows from the table of roles.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.errors import UnsupportedFamily
from sparsekit.models.linears import Linear
from sparsekit.models.roles import FamilySpec, Norm, Part, family
from sparsekit.models.structure import Stack


@dataclass(frozen=True)
class Matrix:
    """A parameter one of whose axes is the stream's.

    Attributes:
        name: The model's name of it.
        axis: The axis, counted from the end.
        bias: Name of the bias of its outputs; None without one.
    """

    name: str
    axis: int
    bias: str | None = None


@dataclass(frozen=True)
class Branch:
    """What reads the stream through one norm, and what of it is added to the stream.

    Attributes:
        norm: Name of the norm.
        readers: What reads the norm's outputs.
        writers: What is added to the stream, at the next place; empty for the head.
        module: Name of the module whose output is added; empty where that is not one module alone, as for the head.
    """

    norm: str
    readers: tuple[Matrix, ...]
    writers: tuple[Matrix, ...] = ()
    module: str = ""


@dataclass(frozen=True)
class Place:
    """A place where the stream is read; `block` is None for the head's."""

    block: int | None
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Residual:
    """The residual stream of a model.

    Attributes:
        places: In the order of the model; the last is the head's.
        embeddings: What the stream starts with.
        norm: What all the norms are.
        head: Name of the module that makes logits.
        scaled: Embeddings are multiplied by the root of the stream's width as the configuration has it.
    """

    places: tuple[Place, ...]
    embeddings: tuple[Matrix, ...]
    norm: Norm
    head: str
    scaled: bool

    @property
    def centred(self) -> bool:
        """Whether its norms subtract the mean."""
        return self.norm.startswith("layer")

    def of_block(self, block: int | None) -> list[tuple[int, Place]]:
        """Return the places of a block (None: the head's) with their numbers."""
        return [(number, place) for number, place in enumerate(self.places) if place.block == block]


def residual(model: Any, stack: Stack) -> Residual:
    """Return the residual stream of a transformers model; its parameters may be on meta.

    Raises:
        UnsupportedFamily: Its stream has no such form, or its roles are not known; says why.
    """
    spec = family(model)
    _refuse(model, stack, spec)
    places = [place for block in range(len(stack.blocks)) for place in _places(model, stack, spec, block)]
    head = Branch(spec.final_norm, (_reader_of(model, spec.head),))
    embeddings = tuple(Matrix(f"{name}.weight", -1) for name in spec.embeddings)
    return Residual((*places, Place(None, (head,))), embeddings, spec.norm, spec.head, spec.scaled_embeddings)


def is_parallel(model: Any, spec: FamilySpec) -> bool:
    """Whether attention and MLP of a block read the same stream."""
    return spec.attention_norm == spec.mlp_norm or bool(getattr(model.config, "use_parallel_residual", False))


def _places(model: Any, stack: Stack, spec: FamilySpec, block: int) -> Iterator[Place]:
    prefix = stack.prefix(block)
    linears = {linear.name.removeprefix(f"{prefix}."): linear for linear in stack.linears(block)}
    parts: tuple[tuple[Part, str | None, Sequence[str]], ...] = (
        ("attention", spec.attention_norm, ()),
        ("mlp", spec.mlp_norm, spec.routers),
    )
    branches = []
    for part, norm, routers in parts:
        ends = spec.branch(part, linears)
        readers = [_matrix(linears[name], -1) for name, writes in ends.items() if not writes]
        writers = [_matrix(linears[name], -2) for name, writes in ends.items() if writes]
        readers += [_reader_of(model, f"{prefix}.{name}") for name in routers if _has(stack.blocks[block], name)]
        if part == "mlp" and is_parallel(model, spec) and norm is not None and not _has(stack.blocks[block], norm):
            norm = spec.attention_norm
        module = f"{prefix}.{_owner(part, spec, ends)}"
        branches.append(Branch(f"{prefix}.{norm}", _once(readers), _once(writers), module))
    if is_parallel(model, spec):
        yield Place(block, _by_norm(branches))
    else:
        yield from (Place(block, (branch,)) for branch in branches)


def _by_norm(branches: Sequence[Branch]) -> tuple[Branch, ...]:
    """Join branches that share their norm, so that each norm is moved once."""
    first, second = branches
    if first.norm != second.norm:
        return first, second
    return (Branch(first.norm, first.readers + second.readers, first.writers + second.writers),)


def _owner(part: Part, spec: FamilySpec, ends: dict[str, bool]) -> str:
    """Return the module, relative to the block, that holds all of a branch; or its last linear where there is none."""
    if part == "attention":
        return spec.attention.output.rpartition(".")[0]
    top = {name.partition(".")[0] for name in ends}
    return top.pop() if len(top) == 1 else next(name for name, writes in ends.items() if writes)


def _matrix(linear: Linear, axis: int) -> Matrix:
    """Return a linear's parameter, `axis` for [out, in]; that of all experts for one of them."""
    bias = None if linear.bias() is None else linear.bias_name
    return Matrix(linear.parameter_name, -3 - axis if linear.transposed else axis, bias)


def _reader_of(model: Any, name: str) -> Matrix:
    module = model.get_submodule(name)
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    return Matrix(f"{name}.weight", -1, bias)


def _once(matrices: Sequence[Matrix]) -> tuple[Matrix, ...]:
    return tuple({matrix.name: matrix for matrix in matrices}.values())


def _has(block: Any, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())


def _refuse(model: Any, stack: Stack, spec: FamilySpec) -> None:
    """Refuse models whose stream is read or written in another way.

    Raises:
        UnsupportedFamily: says how.
    """
    name = type(model).__name__
    if spec.attention_norm is None or spec.branch_norms:
        found = f"{', '.join(spec.branch_norms)} between a branch and the residual stream"
        why = "a rotation cannot be moved past its scales"
        raise UnsupportedFamily(f"{name} has norms ({found}): {why}, so its stream cannot be rotated or sliced")
    if getattr(model.config, "do_layer_norm_before", True) is False:
        raise UnsupportedFamily(f"{name} has its norms behind the sums: its stream cannot be rotated or sliced")
    known = (*spec.embeddings, spec.final_norm, spec.head)
    for parameter, _ in model.named_parameters():
        outside = stack.owner(parameter) is None
        if outside and not any(fnmatch.fnmatchcase(parameter, f"{module}.*") for module in known):
            raise UnsupportedFamily(
                f"{name} has {parameter} beside embeddings, final norm and head: its stream cannot be rotated or sliced"
            )
