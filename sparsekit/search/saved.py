"""The state of a search on disk, written after every generation: what is interrupted goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparsekit import fs, ranks
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.errors import CheckpointError
from sparsekit.search.evolution import Generation
from sparsekit.search.switches import Levels


class SavedSearch:
    """One search in the folder of its level database; of several ranks, the first has the file."""

    def __init__(self, folder: Path, identity: Mapping[str, JSON]) -> None:
        """Find the search of `identity`, its options and its seed, if one was begun; `folder` is made."""
        fs.make_folder(folder)
        self._path = folder / f"search-{jsonio.digest(dict(identity))[:16]}.json"
        self.generations: int | None = None
        """How many generations it has, once that is decided."""
        self.history: dict[int, float] = {}
        """Fitness of the best by generation: the start, and whenever it fell."""
        self.last: Generation[Levels] | None = None
        if self._path.exists():
            self._load()

    def decide(self, generations: int) -> int:
        """Fix the number of generations, unless an interrupted run has; return it."""
        if self.generations is None:
            self.generations = generations
        return self.generations

    def add(self, found: Generation[Levels]) -> None:
        """Keep a generation."""
        if not self.history or found.fitness < min(self.history.values()):
            self.history[found.number] = found.fitness
        self.last = found
        text = jsonio.canonical(
            {
                "generations": self.generations,
                "number": found.number,
                "best": list(found.best),
                "fitness": found.fitness,
                "samples": found.samples,
                "history": {str(number): fitness for number, fitness in self.history.items()},
            }
        )
        ranks.share(lambda: fs.replace_file(self._path, text))

    def _load(self) -> None:
        with fs.typed_errors(self._path):
            data = self._path.read_bytes()
        try:
            record = jsonio.parse(data, where=str(self._path))
            assert isinstance(record, dict)  # noqa: S101  (what follows refuses anything else)
            self.generations = int(record["generations"])
            self.history = {int(number): float(fitness) for number, fitness in record["history"].items()}
            best = tuple(int(level) for level in record["best"])
            self.last = Generation(int(record["number"]), best, float(record["fitness"]), int(record["samples"]))
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"not the state of a search that this version wrote: {error!r}",
                where=str(self._path),
                hint="Delete that file: the search begins again.",
            ) from error
