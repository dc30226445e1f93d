"""Measuring changed models by how far their predictions are from the dense model's."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sparsekit.contracts import WholeModel
from sparsekit.errors import NonFinite
from sparsekit.lanes import side_by_side
from sparsekit.progress import Reporter, track
from sparsekit.search.divergence import Reference, divergence, reference
from sparsekit.search.options import SearchOptions

State = TypeVar("State")


@dataclass(frozen=True)
class Predictions:
    """What the dense model predicts on every sample of the pool, and how fast it did (tokens per second)."""

    samples: tuple[Reference, ...]
    tokens_per_second: float


def predictions(model: WholeModel, options: SearchOptions, reporter: Reporter) -> Predictions:
    """Run the model, which is still dense, on the pool."""
    task = "search: predictions of the dense model"
    start = time.perf_counter()
    found = tuple(
        reference(model.logits(sample)[:-1], options.top)
        for sample in track(range(options.samples), reporter, task, options.samples, "samples")
    )
    return Predictions(found, options.samples * options.sequence_length / (time.perf_counter() - start))


class DivergenceLandscape(ABC, Generic[State]):
    """Mean divergence from the dense model; a subclass says how the model becomes a state."""

    def __init__(self, model: WholeModel, dense: Predictions) -> None:
        """Begin at the dense model."""
        self._model = model
        self._dense = dense.samples
        self.tick: Callable[[int], None] = lambda samples: None
        """Called with the number of samples after each state that was measured."""

    @abstractmethod
    def enter(self, state: State) -> None:
        """Make the model what `state` says."""

    @abstractmethod
    def leave(self) -> None:
        """Give the model back dense."""

    def fitness(self, states: Sequence[State], draw: Sequence[int]) -> list[float]:
        """Return the mean divergence of each state on the samples `draw`, nats per token."""
        return [self._measure(state, draw) for state in states]

    def _measure(self, state: State, draw: Sequence[int]) -> float:
        self.enter(state)
        found = [0.0] * len(draw)

        def one(place: int, _: object) -> None:
            sample = draw[place]
            found[place] = divergence(self._dense[sample], self._model.logits(sample)[:-1])

        side_by_side(len(draw), one)
        mean = sum(found) / len(found)
        if mean != mean:
            raise NonFinite(
                "what a search tries makes the model predict NaN", hint="Run with --dtype fp32 or --dtype bf16."
            )
        self.tick(len(draw))
        return mean
