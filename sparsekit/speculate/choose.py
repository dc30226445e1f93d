"""Choosing which branches a draft leaves out: offline, on given text, before anything is generated.

**What it does.** Agreement is the share of tokens behind which the model expects the same token with and without the
branches, from one parallel pass of the draft over the text. Branches are ranked by the agreement without each of them
alone. The first n of the ranking are left out, n chosen by the speed that agreement and cost promise. Then branches
are exchanged at random, and a change stays if it agrees strictly more often.

**Source.** Xia et al. 2024, "SWIFT", arXiv 2410.06916: agreement as score, strict improvement, the first and last
block untouched.

**Deviations.** SWIFT searches while it generates, leaves out 45 % of the branches and starts from every second one. At
135 million parameters every second branch agrees for 4 % of the tokens where the ranking's agree for 29 %, and where
fewer are left out the draft is both slower and right more often: the number has to be part of the choice.

**Cost.** A pass over the text for each branch, for each number tried, and for each random change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from sparsekit.errors import UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.roles import Part
from sparsekit.rng import derive
from sparsekit.speculate.decoding import SKIP_WINDOW, Mode
from sparsekit.speculate.skipping import PARTS, Skipper, Skips

if TYPE_CHECKING:
    from torch import Tensor

Branch = tuple[Part, int]
SIZES = 12
"""Numbers of branches that are tried, evenly spread up to half of all."""
MOST_EXCHANGED = 3


@dataclass(frozen=True)
class Choice:
    """A skip set and what it promises.

    Attributes:
        skips: What is left out.
        agreement: Share of tokens of the text behind which draft and full model expect the same.
        speed: Expected tokens per second, as a multiple of the full model's.
        tries: Sets that were tried.
    """

    skips: Skips
    agreement: float
    speed: float
    tries: int


def choose(
    model: Any,
    skipper: Skipper,
    ids: Tensor,
    *,
    changes: int,
    seed: int,
    full: Mode,
    advance: Callable[[], None] = lambda: None,
) -> Choice:
    """Search a skip set.

    Args:
        model: A transformers model.
        skipper: Its branches.
        ids: Text, [samples, sequence_length].
        changes: Random changes to try; the ranking is made in any case.
        seed: Of the changes.
        full: Opens the context in which the full model computes.
        advance: Called after each try; `tries` says how many there will be.

    Raises:
        UnsupportedFamily: The model has no block between its first and last.
    """
    branches: list[Branch] = [(part, block) for block in range(1, skipper.blocks - 1) for part in PARTS]
    if not branches:
        raise UnsupportedFamily(
            f"{type(model).__name__} has {skipper.blocks} blocks, of which the first and the last always compute: "
            "there is nothing to leave out"
        )
    with full():
        expected = _expected(model, ids)

    def agreement(chosen: list[Branch]) -> float:
        with skipper.skipping(_skips(chosen))():
            same = _expected(model, ids) == expected
        advance()
        return float(same.double().mean())

    alone = {branch: agreement([branch]) for branch in branches}
    ranked = sorted(branches, key=lambda branch: -alone[branch])  # stable: ties in the order of the model
    found = [(ranked[:size], agreement(ranked[:size])) for size in _sizes(len(ranked))]
    best, agreed = max(found, key=lambda pair: expected_speed(pair[1], skipper.cost(_skips(pair[0]))))
    random = Random(derive(seed, "skip set"))  # noqa: S311
    for _ in range(changes):
        candidate = _exchanged(best, branches, random)
        if (score := agreement(candidate)) > agreed:
            best, agreed = candidate, score
    skips = _skips(best)
    return Choice(skips, agreed, expected_speed(agreed, skipper.cost(skips)), tries(skipper.blocks, changes))


def tries(blocks: int, changes: int) -> int:
    """Return how many sets `choose` tries in a model of so many blocks."""
    branches = 2 * (blocks - 2)
    return branches + len(_sizes(branches)) + changes


def expected_speed(agreement: float, cost: float) -> float:
    """Return tokens per time as a multiple of the full model's, for the best length of drafts.

    Args:
        agreement: Chance that a drafted token stays.
        cost: Of a draft pass, as a share of a full one.
    """
    chances = [agreement**place for place in range(SKIP_WINDOW.tokens + 1)]  # that so many drafted tokens all stay
    return max(
        sum(chances[: length + 1]) / (length * cost + 1)  # Leviathan et al., theorem 3.8
        for length in range(1, SKIP_WINDOW.tokens + 1)
    )


def _sizes(branches: int) -> list[int]:
    """Return numbers of branches to leave out, ascending."""
    most = max(1, branches // 2)
    return sorted({max(1, most * step // SIZES) for step in range(1, SIZES + 1)})


def _exchanged(chosen: list[Branch], branches: list[Branch], random: Random) -> list[Branch]:
    """Return `chosen` with one to three branches in place of others."""
    others = [branch for branch in branches if branch not in chosen]
    count = min(random.randint(1, MOST_EXCHANGED), len(chosen), len(others))
    dropped = random.sample(chosen, count)
    return [branch for branch in chosen if branch not in dropped] + random.sample(others, count)


def _skips(chosen: list[Branch]) -> Skips:
    attention, mlp = (tuple(sorted(block for own, block in chosen if own == part)) for part in PARTS)
    return Skips(attention, mlp)


def _expected(model: Any, ids: Tensor) -> Tensor:
    """Return the likeliest token behind each of `ids: [samples, sequence_length]`."""
    with torch.inference_mode():
        rows = [model(input_ids=sample[None], use_cache=False).logits[0].argmax(-1) for sample in ids]
    return torch.stack(rows)
