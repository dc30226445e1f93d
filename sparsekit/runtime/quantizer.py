"""How transformers loads a packed checkpoint: as a quantisation method called `sparsekit`.

Nearly every mistake in this interface of transformers shows as random weights, not as an exception. So the format
version is checked before anything is built, every packed tensor is validated before it is unpacked, and the number of
unpacked tensors must be the number that the files hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekit.checkpoint.source import PACKED_INDEX
from sparsekit.errors import HeaderError, IndexMismatch, VersionError
from sparsekit.pack import Encoding, Layout, read, unpack
from sparsekit.pack.files import PackedFile
from sparsekit.pack.tensor import SHAPE
from sparsekit.pack.types import dtype_name

METHOD = "sparsekit"
FORMAT_VERSION = 1
PARTS = (
    "weight", SHAPE, "weight_bitmask", "weight_row_offsets", "weight_nz", "weight_index", "weight_blocks", "weight_low",
    "weight_code", "weight_width", "weight_dict", "weight_patch_row", "weight_patch_col", "weight_patch_value",
    "weight_scales",
)  # fmt: skip
"""Every name that `weight` can be stored under."""


class SparsekitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed checkpoint.

    Attributes:
        format_version: Version of docs/format.md that the files follow.
        pattern: Pattern of all packed tensors.
        dequantize: Unpack while loading; the model is then an ordinary dense one.
    """

    def __init__(
        self, format_version: int = FORMAT_VERSION, pattern: str = "unstructured", dequantize: bool = True, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.pattern = pattern
        self.dequantize = dequantize


class Unpack(ConversionOps):  # type: ignore[misc]
    """Turns the parts of packed tensors into the dense tensor; what is dense already passes through."""

    def __init__(self, hf_quantizer: SparsekitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        """Copies, made for every tensor, report to the one quantizer."""
        return Unpack(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, list[torch.Tensor]]:
        """Return pattern or name of each weight -> dense tensors, in the order of the parts' lists."""
        grouped: dict[str, dict[str, list[torch.Tensor]]] = {}
        for source, tensors in input_dict.items():
            owner, _, part = source.rpartition(".")
            grouped.setdefault(owner, {})[part] = tensors if isinstance(tensors, list) else [tensors]
        result: dict[str, list[torch.Tensor]] = {}
        for owner, parts in grouped.items():
            lengths = {part: len(found) for part, found in parts.items()}
            if len(set(lengths.values())) != 1:
                raise IndexMismatch(f"parts of packed tensors do not pair up: {lengths}", where=full_layer_name)
            name = f"{owner}.weight" if owner else full_layer_name
            # transformers leaves the cast to ops that read packed tensors
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype
            result[name] = [
                self.hf_quantizer.unpack({part: found[i] for part, found in parts.items()}, full_layer_name).to(dtype)
                for i in range(next(iter(lengths.values())))
            ]
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes the dense tensor."""
        from transformers.core_model_loading import _IdentityOp

        return _IdentityOp()


class SparsekitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed checkpoints; it cannot make them (`sparsekit prune` does)."""

    requires_calibration = True
    serialized_names: Mapping[str, list[str]] = {"weight": list(PARTS)}

    def __init__(self, quantization_config: SparsekitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._facts: dict[str, dict[str, Any]] = {}
        self._unpacked = 0

    def unpack(self, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """Return the dense tensor of `parts`, validated; a lone `weight` is dense already.

        Args:
            parts: Part name -> tensor.
            name: The parameter that is loaded; for experts the one that many tensors become together.
        """
        if set(parts) == {"weight"}:
            return parts["weight"]
        facts = self._facts_of(name) or self._raw_facts(parts, name)
        packed = read(facts, {part: tensor.contiguous() for part, tensor in parts.items()}, name)
        self._unpacked += 1
        return unpack(packed)

    def _facts_of(self, name: str) -> dict[str, Any] | None:
        """Return the file's entry for a parameter; names may differ by the prefix of the base model."""
        if name in self._facts:
            return self._facts[name]
        near = [key for key in self._facts if name.endswith(f".{key}") or key.endswith(f".{name}")]
        return self._facts[near[0]] if len(near) == 1 else None

    def _raw_facts(self, parts: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
        """Return the entry of an expert's tensor from its parts alone; experts are stored with raw values."""
        if not {SHAPE, "weight_nz"} <= parts.keys():
            raise HeaderError(f"no entry in the file, and the parts {sorted(parts)} do not tell", where=name)
        values = parts["weight_nz"]
        return {
            "layout": Layout.NM if "weight_index" in parts else Layout.BITMASK,
            "encoding": Encoding.RAW,
            "shape": parts[SHAPE].tolist(),
            "dtype": dtype_name(values.dtype),
            "pattern": self.quantization_config.pattern,
            "nnz": values.numel(),
        }

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a format that this version does not know."""
        version = self.quantization_config.format_version
        if version != FORMAT_VERSION:
            raise VersionError(
                f"packed format version {version}, this sparsekit reads {FORMAT_VERSION}",
                hint="Upgrade: pip install --upgrade sparsekit",
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight files; they are not called as usual, so that nothing else loads them by mistake."""
        config.transformers_weights = PACKED_INDEX
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        for file in checkpoint_files or []:
            self._facts |= PackedFile(Path(file)).facts
        if not self._facts:
            raise IndexMismatch("the files hold no packed tensor, the configuration says they do", where=PACKED_INDEX)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        if self._unpacked != len(self._facts):
            raise IndexMismatch(
                f"{self._unpacked} of {len(self._facts)} packed tensors were unpacked",
                hint="The checkpoint belongs to another version of transformers or of the model.",
            )
        # What was loaded through packed parts is saved through the architecture's own names.
        model._weight_conversions = None
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Both ways of loading unpack."""
        return {"dequantize": Unpack, "deserialize": Unpack}

    def is_serializable(self) -> bool:
        """A loaded model saves as an ordinary dense checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Unpacked weights are ordinary parameters."""
        return True


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a module that is loaded twice registers once
    register_quantization_config(METHOD)(SparsekitConfig)
    register_quantizer(METHOD)(SparsekitQuantizer)
