"""How much a search does: the options of all of them, and what they make of a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsekit.contracts import MethodOptions, Probes
from sparsekit.errors import SparsekitError
from sparsekit.search.budget import parse_budget
from sparsekit.search.evolution import Schedule, Stage


class SearchOptions(MethodOptions):
    """Options of all searches."""

    generations: int = Field(default=400, ge=1, description="most generations")
    budget: str | None = Field(default=None, description="time (10min, 2h) or tokens (20Mtokens) that end it earlier")
    offspring: int = Field(default=16, ge=1, description="choices that are tried in each generation")
    survivors: tuple[int, ...] = Field(default=(1, 1), min_length=1, description="choices left after each stage")
    tokens: tuple[int, ...] = Field(
        default=(512, 8192), min_length=1, description="tokens of each stage; the last stage has the same ones always"
    )
    samples: int = Field(default=64, ge=1, description="calibration samples that tokens are drawn from")
    sequence_length: int = Field(default=512, ge=8, description="tokens of each sample")
    fitness: Literal["kl", "perplexity"] = Field(
        default="kl",
        description="what is compared: divergence from the dense model's predictions, or loss on the text itself",
    )
    top: int = Field(default=512, ge=1, description="likeliest tokens of the dense model that are compared")

    @field_validator("budget")
    @classmethod
    def _is_budget(cls, text: str | None) -> str | None:
        if text is not None:
            parse_budget(text)
        return text

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if len(self.survivors) != len(self.tokens):
            raise ValueError(f"{len(self.survivors)} numbers of survivors for {len(self.tokens)} stages of tokens")
        for tokens in self.tokens:
            if tokens <= 0 or tokens % self.sequence_length:
                raise ValueError(f"{tokens} tokens are no whole samples of {self.sequence_length}")
        try:
            self.schedule()
        except SparsekitError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def measure(self) -> str:
        """What fitness is, in a word."""
        return "KL" if self.fitness == "kl" else "loss"

    def schedule(self) -> Schedule:
        """Return the stages in samples."""
        samples = [tokens // self.sequence_length for tokens in self.tokens]
        stages = tuple(Stage(*pair) for pair in zip(self.survivors, samples, strict=True))
        return Schedule(self.generations, self.offspring, stages, self.samples)

    def affordable(self, tokens: int, searches: int) -> int:
        """Return the generations that so many searches of as many can have with `tokens` in all."""
        whole = self.schedule()
        fit = (tokens // searches // self.sequence_length - whole.fixed) // whole.evaluated()
        return max(min(self.generations, fit), 1)

    def probes(self, searches: int) -> Probes:
        """Return the part of the calibration text that choices are compared on, for so many searches."""
        limit = parse_budget(self.budget) if self.budget else None
        if limit and limit.seconds:
            return Probes(self.samples, self.sequence_length, own_dtype=True, searched_seconds=limit.seconds)
        whole = self.schedule()
        generations = self.affordable(limit.tokens, searches) if limit and limit.tokens else self.generations
        tokens = searches * (generations * whole.evaluated() + whole.fixed) * self.sequence_length
        return Probes(self.samples, self.sequence_length, own_dtype=True, searched_tokens=tokens)

    def affordable_schedule(self, tokens_per_second: float, passed_seconds: float, searches: int) -> Schedule:
        """Return the stages, with as many generations as the budget leaves for each of so many searches.

        Args:
            tokens_per_second: Speed of measuring.
            passed_seconds: Of a budget in time, what is gone.
            searches: Searches of equal size that share the budget.
        """
        whole = self.schedule()
        if self.budget is None:
            return whole
        limit = parse_budget(self.budget)
        tokens = limit.tokens
        if tokens is None:
            assert limit.seconds is not None  # noqa: S101  (one of both is given)
            tokens = int(max(limit.seconds - passed_seconds, 0) * tokens_per_second)
        return replace(whole, generations=self.affordable(tokens, searches))
