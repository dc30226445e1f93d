"""What blocks have inside that can become narrower, and how many parameters of the model that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsekit.checkpoint.shapes import Shapes, Widths
from sparsekit.errors import PlanError
from sparsekit.models.block import Block, require_channels
from sparsekit.models.shapes import parameters, variant
from sparsekit.models.structure import find_stack


@dataclass(frozen=True)
class Inside:
    """The inside of blocks that are all alike.

    Attributes:
        neurons: Of an MLP.
        channels: Of a head; 0 where heads stay as they are.
        paired: Positions turn pairs of channels half a head apart.
    """

    neurons: int
    channels: int
    paired: bool

    @classmethod
    def of(cls, model: Any, *, heads: bool) -> Inside:
        """Return the inside of a transformers model's blocks; its parameters may be on meta.

        Args:
            model: The model.
            heads: Whether heads are to lose channels.

        Raises:
            PlanError: The blocks are not alike.
            UnsupportedFamily: Neurons or channels cannot be removed; says why.
        """
        stack = find_stack(model)
        blocks = [Block.of(model, stack, index) for index in range(len(stack.blocks))]
        found = set()
        for block in blocks:
            if heads:
                require_channels(model, block)
            neurons = block.named[block.down].info.in_features
            paired = block.spec.attention.rotary == "halves"
            found.add(cls(neurons, block.heads().sets.shape[-1] if heads else 0, paired))
        if len(found) > 1:
            listed = ", ".join(str(each.neurons) for each in sorted(found, key=lambda each: each.neurons))
            raise PlanError(
                f"its blocks have different widths already ({listed} neurons)",
                hint="Put this stage before what narrows them.",
            )
        return found.pop()

    def without(self, neurons: int, channels: int) -> Widths:
        """Return the widths of a block that has lost so many; of its pairs the first are said to stay."""
        left = self.channels - channels
        pairs = tuple(range(left // 2)) if channels and self.paired else None
        return Widths(None, self.neurons - neurons if neurons else None, left if channels else None, pairs)

    def worth(self, model: Any, shapes: Shapes) -> Iterator[int]:
        """Yield the parameters of one neuron, then of one channel of every head, in all blocks together.

        Seen by building the architecture without it, which knows of biases and of what is tied.
        """
        blocks, before = len(find_stack(model).blocks), parameters(model)
        for count, width in ((1, self.without(1, 0)), (2, self.without(0, 2))):
            if count == 1 or self.channels:
                yield (before - parameters(variant(model, {}, shapes.narrowed([width] * blocks)))) // count
