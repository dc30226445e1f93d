"""SliceGPT: a narrower residual stream.

What it does: turns the residual stream so that its directions are in the order of what they carry, and cuts the last
    ones off, with the rows and columns of everything that reads or writes them. `rotation: per_block` has a basis for
    every place where the stream is read, and a matrix at each sum that carries it from one to the next; `global` has
    one basis for all of them, needs no such matrices, and is an ordinary checkpoint of the same architecture wherever
    that can express it.
Source: Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", arXiv 2401.15024:
    computational invariance (theorem 1, equations 3 to 5), principal components (section 3.3), slicing (3.4).
Shapes: stream [tokens, hidden] -> [tokens, width]; a shortcut [width behind, width in front].
Cost: per block as many passes as it has places and one more; an eigendecomposition of hidden^3 per place. Global: two
    walks with two passes per block, one eigendecomposition, a solve of width^3 per place.
Deviations: `global` is ours, and so is its refit (`solve/rotation.py`): one basis fits no place quite, and each place's
    readers make up for what the basis lacks there. Nothing is centred for models whose norms do not subtract the mean;
    those that do keep their norms, since the stream is turned into the hyperplane of mean zero (the paper makes
    RMSNorms of them). The stream is scaled so that norms divide as before at their own eps. No damping: a multiple of
    the identity changes no eigenvector. Components are in order, not turned at random, unless `orientation: random`.
    Widths are multiples of 8.
Numbers: Llama-2-7B, WikiText-2, 20 / 25 / 30 % of the width: 6.64, 7.24, 8.12, dense 5.47. SmolLM2-135M see
    docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sparsekit import ranks
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import Shapes
from sparsekit.contracts import Anatomy, MethodOptions, ReshapeContext, Reshaped, Reshaper
from sparsekit.errors import PlanError
from sparsekit.models.residual import Residual, residual
from sparsekit.models.shapes import parameters
from sparsekit.models.slicing import plain_config, sliced_parameters, untied
from sparsekit.models.structure import find_stack
from sparsekit.rng import derive
from sparsekit.solve.rotate import Rotation
from sparsekit.solve.rotation import Basis, principal_basis, random_orientation
from sparsekit.solve.stream_bases import BasisFiles, StreamBases

if TYPE_CHECKING:
    from torch import Tensor


class SliceGPTOptions(MethodOptions):
    """Options of `slicegpt`: `width` or `params`, not both."""

    width: float | None = Field(default=None, ge=0, lt=1, description="share of the residual stream's width that goes")
    params: float | None = Field(
        default=None, gt=0, lt=1, description="share of all parameters of the model that goes; 0.25 without width"
    )
    rotation: Literal["global", "per_block"] = Field(
        default="global", description="one basis for the whole stream; or one for each place, with shortcut matrices"
    )
    schedule: tuple[float, ...] = Field(
        default=(), description="per_block: in place of width, the share of each block, or of the first and the last"
    )
    multiple: int = Field(default=8, ge=1, description="widths are rounded down to a multiple of it")
    slice_head: bool = Field(default=False, description="per_block: cut what the head reads too")
    weigh: Literal["tokens", "energy"] | None = Field(
        default=None,
        description="tokens count alike (default of global), or by their length as published (of per_block)",
    )
    refit: bool | None = Field(
        default=None,
        description="global: readers make up for what is cut, as far as the rest tells it; true if not set",
    )
    orientation: Literal["pca", "random"] = Field(
        default="pca", description="components in order, or turned at random (seeded)"
    )
    allow_growth: bool = Field(default=False, description="accept a model that has no fewer parameters")

    @model_validator(mode="after")
    def _one_amount(self) -> SliceGPTOptions:
        given = [name for name in ("width", "params", "schedule") if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; need one of width, params, schedule")
        if self.rotation == "per_block" and self.refit:
            raise ValueError("refit is for rotation: global; the components of each place tell nothing of the others")
        if self.rotation == "global" and (self.schedule or self.slice_head):
            name = "schedule" if self.schedule else "slice_head"
            raise ValueError(f"{name} is for rotation: per_block; one basis has one width")
        if any(not 0 <= share < 1 for share in self.schedule):
            raise ValueError(f"schedule: need shares from 0 up to 1, got {list(self.schedule)}")
        return self


class SliceGPT(Reshaper[SliceGPTOptions]):
    """Cut the residual stream to its principal components."""

    options_type = SliceGPTOptions
    sums_of = "stream"

    def __init__(self, options: SliceGPTOptions, seed: int) -> None:
        """Tokens count by their energy or alike."""
        super().__init__(options, seed)
        weigh = options.weigh or ("tokens" if options.rotation == "global" else "energy")
        self._stat = "directions" if weigh == "tokens" else "gram"
        self.needs = frozenset({self._stat})  # type: ignore[misc]

    @property
    def grows(self) -> bool:
        """Whether the user accepts a model of more parameters."""
        return self.options.allow_growth

    def check(self, anatomy: Anatomy) -> None:
        """Refuse families whose stream cannot be turned, and widths of nothing."""
        self._widths(anatomy, self._residual(anatomy))

    def tokens(self, anatomy: Anatomy) -> int:
        """As many vectors as the stream keeps directions."""
        return max(width or 0 for width in self._widths(anatomy, self._residual(anatomy)))

    def outline(self, anatomy: Anatomy) -> Reshaped:
        """The shapes follow from the options alone."""
        stream = self._residual(anatomy)
        widths = self._widths(anatomy, stream)
        config, shapes = self._shapes(anatomy, stream, widths)
        notes = () if shapes.stream is None else self._nearest_plain(anatomy, stream, widths[0] or 0)
        return Reshaped(tuple(range(anatomy.blocks)), config, shapes, notes=notes)

    def plan(self, context: ReshapeContext) -> dict[str, JSON]:
        """Find the bases and write each into a file of the context's folder."""
        assert context.folder is not None  # noqa: S101  (a stage has one)
        stream = self._residual(context.anatomy)
        widths = self._widths(context.anatomy, stream)
        bases = StreamBases(context, stream, self._stat, partial(self._basis, stream))
        if self.options.rotation == "global":
            found = bases.shared(widths[0] or 0, refit=self.options.refit is not False)
        else:
            found = bases.each(widths)
        folder = context.folder / "bases"
        files: dict[str, JSON] = {
            str(number): ranks.share(partial(BasisFiles.write, folder, number, basis)) for number, basis in found
        }
        read = {place.block: width for width, place in zip(widths, stream.places, strict=True) if width is not None}
        context.facts["width"] = {str(block): float(width) for block, width in read.items() if block is not None}
        return {"files": files}

    def apply(self, anatomy: Anatomy, plan: Mapping[str, JSON], folder: Path | None) -> Reshaped:
        """Turn and cut every block when it is written."""
        assert folder is not None  # noqa: S101  (`plan` has kept files in it)
        stream = self._residual(anatomy)
        widths, files = self._widths(anatomy, stream), plan["files"]
        assert isinstance(files, dict)  # noqa: S101  (a plan that `plan` has made)
        config, shapes = self._shapes(anatomy, stream, widths)
        bases = BasisFiles(folder / "bases", files, widths)
        stack = find_stack(anatomy.model)
        prefixes = [stack.prefix(block) for block in range(anatomy.blocks)]
        rescaled = stream.scaled and shapes.stream is None
        factor = (anatomy.model.config.hidden_size / (widths[0] or 0)) ** 0.5 if rescaled else 1.0
        rotation = Rotation(stream, bases, prefixes, self.options.rotation == "per_block", factor)

        def tensors(block: int | None) -> Mapping[str, Tensor]:
            model = anatomy.model
            return rotation.outside(model) if block is None else rotation.of_block(model, block)

        return Reshaped(tuple(range(anatomy.blocks)), config, shapes, tensors=tensors)

    def _residual(self, anatomy: Anatomy) -> Residual:
        if anatomy.shapes.stream is not None:
            raise PlanError(
                "the model's residual stream is sliced already", hint="Slice the model it was made from, once."
            )
        return residual(anatomy.model, find_stack(anatomy.model))

    def _widths(self, anatomy: Anatomy, stream: Residual) -> tuple[int | None, ...]:
        """Return the width at each place; None: uncut, in its own basis."""
        options, hidden = self.options, int(anatomy.model.config.hidden_size)
        if options.schedule:
            shares = _spread(options.schedule, anatomy.blocks)
            widths = [self._rounded(hidden * (1 - shares[place.block or 0])) for place in stream.places[:-1]]
            return (*widths, widths[-1] if options.slice_head else None)
        if options.width is not None:
            return self._uniform(stream, self._rounded(hidden * (1 - options.width)))
        return self._for_params(anatomy, stream, hidden)

    def _uniform(self, stream: Residual, width: int) -> tuple[int | None, ...]:
        head = width if self.options.rotation == "global" or self.options.slice_head else None
        return (*[width] * (len(stream.places) - 1), head)

    def _for_params(self, anatomy: Anatomy, stream: Residual, hidden: int) -> tuple[int | None, ...]:
        """Return the largest width that leaves no more than the parameters asked for."""
        share = 0.25 if self.options.params is None else self.options.params
        before = parameters(anatomy.model)
        per_block = self.options.rotation == "per_block"

        def after(width: int) -> int:
            widths = [hidden if each is None else each for each in self._uniform(stream, width)]
            return sliced_parameters(anatomy.model, stream, widths, shortcuts=per_block)

        step = self.options.multiple
        low, high = 1, hidden // step + 1  # in steps; low may fit, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if after(middle * step) <= (1 - share) * before else (low, middle)
        if (left := after(low * step)) > (1 - share) * before:
            raise PlanError(
                f"a stream of width {low * step} still leaves {left:,} parameters, {share:g} less than {before:,} are "
                f"{int((1 - share) * before):,}",
                where="params",
                hint="Take less away, or drop blocks (layer_drop).",
            )
        return self._uniform(stream, low * step)

    def _rounded(self, width: float) -> int:
        step = self.options.multiple
        rounded = int(width + 1e-9) // step * step
        if rounded < step:
            raise PlanError(
                f"{width:g} of the width is left, less than {step}",
                where="width",
                hint="Take less away, or lower multiple.",
            )
        return rounded

    def _shapes(
        self, anatomy: Anatomy, stream: Residual, widths: Sequence[int | None]
    ) -> tuple[dict[str, JSON], Shapes]:
        """Return the keys of config.json and the shapes: plain ones where the architecture can express them."""
        model, hidden = anatomy.model, int(anatomy.model.config.hidden_size)
        if self.options.rotation == "global":
            width = widths[0] or hidden
            plain = plain_config(model, stream, anatomy.shapes, width)
            if plain is not None:
                return plain, anatomy.shapes
        each = [width or hidden for width in widths]
        return untied(each, shortcuts=self.options.rotation == "per_block", shapes=anatomy.shapes)

    def _nearest_plain(self, anatomy: Anatomy, stream: Residual, width: int) -> tuple[str, ...]:
        """Say which narrower stream plain transformers loads: most architectures want a multiple of their heads."""
        step = math.lcm(self.options.multiple, int(anatomy.model.config.num_attention_heads))
        nearest = width // step * step
        if self.options.rotation != "global" or not nearest:
            return ()
        if plain_config(anatomy.model, stream, anatomy.shapes, nearest) is None:
            return ()
        name = type(anatomy.model).__name__
        return (f"plain transformers builds no {name} of width {width}, but one of {nearest} (multiple: {step})",)

    def _basis(self, stream: Residual, gram: Tensor, width: int, number: int) -> Basis:
        """Return the basis of a place."""
        basis = principal_basis(gram, width, centred=stream.centred)
        if self.options.orientation == "pca":
            return basis
        return random_orientation(basis, derive(self.seed, f"slicegpt.{number}"), centred=stream.centred)


def _spread(schedule: Sequence[float], blocks: int) -> list[float]:
    """Return the share of each block: as given, or on the line from the first to the last."""
    if len(schedule) == blocks:
        return list(schedule)
    if len(schedule) != 2 or blocks < 2:
        raise PlanError(
            f"it has {len(schedule)} entries, the model {blocks} blocks",
            where="schedule",
            hint="Give one share for each block, or two: of the first and of the last.",
        )
    first, last = schedule
    return [first + (last - first) * block / (blocks - 1) for block in range(blocks)]
