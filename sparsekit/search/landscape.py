"""Measuring changed models by how far their predictions are from the dense model's, or from the text."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Generic, TypeVar

from sparsekit import ranks
from sparsekit.contracts import WholeModel
from sparsekit.errors import NonFinite
from sparsekit.lanes import side_by_side
from sparsekit.progress import Reporter
from sparsekit.search.divergence import Reference, divergence, reference, text_reference
from sparsekit.search.options import SearchOptions

State = TypeVar("State")


@dataclass(frozen=True)
class Predictions:
    """What states are compared with on every sample of the pool, and how fast a model predicts (tokens per second)."""

    samples: tuple[Reference, ...]
    tokens_per_second: float


def predictions(model: WholeModel, options: SearchOptions, reporter: Reporter) -> Predictions:
    """Run the model, which is still dense, on the pool; of several ranks each runs it on a part.

    Where the text itself is the measure only the speed is of use.
    """
    task = "search: predictions of the dense model"
    start = time.perf_counter()
    own = range(options.samples)[ranks.portion(options.samples)]

    def predict(sample: int) -> Reference:
        found = reference(model.logits(sample)[:-1], options.top)
        reporter.advance(task)
        return text_reference(model.tokens(sample)) if options.fitness == "perplexity" else found

    reporter.start(task, len(own), "samples")
    found = ranks.spread(range(options.samples), predict)
    reporter.finish(task)
    speed = options.samples * options.sequence_length / (time.perf_counter() - start)
    return Predictions(tuple(found), ranks.share(lambda: speed))


class DivergenceLandscape(ABC, Generic[State]):
    """Mean divergence from what should be predicted; a subclass says how the model becomes a state."""

    def __init__(self, model: WholeModel, dense: Predictions) -> None:
        """Begin at the dense model."""
        self._model = model
        self._dense = dense.samples
        self.tick: Callable[[int], None] = lambda samples: None
        """Called with the number of samples after states were measured."""

    @abstractmethod
    def enter(self, state: State) -> None:
        """Make the model what `state` says."""

    @abstractmethod
    def leave(self) -> None:
        """Give the model back dense."""

    def fitness(self, states: Sequence[State], draw: Sequence[int]) -> list[float]:
        """Return the mean divergence of each state on the samples `draw`, nats per token.

        Of several ranks each measures a part of the states, or of the samples of one; the sums are the same.
        """
        every = [(place, sample) for place in range(len(states)) for sample in draw]
        with ranks.together():
            own = every[ranks.portion(len(every))]
            measured = [self._measure(states[place], part) for place, part in _by_state(own)]
        found = iter([value for part in ranks.gather(measured) for values in part for value in values])
        means = [sum(islice(found, len(draw))) / len(draw) for _ in states]
        if any(mean != mean for mean in means):
            raise NonFinite(
                "what a search tries makes the model predict NaN", hint="Run with --dtype fp32 or --dtype bf16."
            )
        self.tick(len(every))
        return means

    def _measure(self, state: State, samples: Sequence[int]) -> list[float]:
        """Return the divergence of a state on each sample."""
        self.enter(state)
        found = [0.0] * len(samples)

        def one(place: int, _: object) -> None:
            found[place] = divergence(self._dense[samples[place]], self._model.logits(samples[place])[:-1])

        side_by_side(len(samples), one)
        return found


def _by_state(every: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Return the samples of each state, from pairs of both in the order of the states."""
    return [(place, [sample for _, sample in pairs]) for place, pairs in groupby(every, key=itemgetter(0))]
