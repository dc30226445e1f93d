"""The versions of transformers that packed checkpoints load with, and the refusal of all others.

Outside this range nearly every difference in transformers' interface shows as random weights, not as an exception.
"""

from __future__ import annotations

import re
from typing import Any

from sparsekit.errors import VersionError

LOWEST, BELOW = (5, 21), (6, 0)
"""As in pyproject.toml; tested are the lowest and the newest."""


def supported(version: str) -> bool:
    """Return whether packed checkpoints load with this version of transformers."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return LOWEST <= found < BELOW


def refuse(version: str) -> None:
    """Register a method under our name that refuses every packed checkpoint.

    Raises:
        ImportError, AttributeError: A transformers so different that it has no such registry; it knows no packed
            checkpoint either, and finds no weight file of a name it knows.
    """
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, **_: Any) -> None:
            self.quant_method = "sparsekit"

    class Refusal(HfQuantizer):  # type: ignore[misc]
        requires_calibration = True

        def validate_environment(self, *_: Any, **__: Any) -> None:
            raise VersionError(
                f"packed checkpoints load with transformers {_text(LOWEST)} up to, not including, {_text(BELOW)}; "
                f"this is {version}",
                hint=f"Install one: pip install 'transformers>={_text(LOWEST)},<{_text(BELOW)}'",
            )

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None: ...

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any: ...

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    register_quantization_config("sparsekit")(Config)
    register_quantizer("sparsekit")(Refusal)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version)) if version[1] else str(version[0])
