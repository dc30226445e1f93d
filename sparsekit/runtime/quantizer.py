"""How transformers loads a packed or narrow checkpoint: as a quantisation method called `sparsekit`.

Nearly every mistake in this interface of transformers shows as random weights, not as an exception. So the format
version is checked before anything is built, every packed tensor is validated while it is read, and the number of
tensors that arrived in the model must be the number that the files hold.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekit.checkpoint.shapes import FORMAT_VERSION, METHOD, Shapes, config_entries, holds_packed, read_shapes
from sparsekit.checkpoint.source import PACKED_INDEX
from sparsekit.errors import HeaderError, IndexMismatch, KernelsMissing, SparsekitError, UsageError, VersionError
from sparsekit.memory import leave_files, release_freed
from sparsekit.models import headers
from sparsekit.models.shapes import give_shapes
from sparsekit.models.structure import find_stack
from sparsekit.pack.files import PackedFile
from sparsekit.pack.tensor import SHAPE
from sparsekit.pack.verify import require_claims
from sparsekit.runtime import native
from sparsekit.runtime.dense import use_streaming
from sparsekit.runtime.fetching import fetch_gates
from sparsekit.runtime.gates import attach_folder
from sparsekit.runtime.modules import SparseLinear
from sparsekit.runtime.repack import dense, repack

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
_EXPERT = re.compile(r"\.\d+\.(?=[^.]+\.weight$)")
PARTS = (
    "weight", SHAPE, "weight_bitmask", "weight_row_offsets", "weight_nz", "weight_index", "weight_blocks", "weight_low",
    "weight_code", "weight_width", "weight_dict", "weight_patch_row", "weight_patch_col", "weight_patch_value",
    "weight_scales",
)  # fmt: skip
"""Every name that `weight` can be stored under."""


class SparsekitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed or narrow checkpoint; see `checkpoint.shapes`.

    Attributes:
        format_version: Version of docs/format.md that the files follow.
        pattern: Pattern of all packed tensors.
        widths, stream: Of blocks and residual stream, where they are not those of the rest of the configuration.
        activations: Name and sha256 of the file of gates that belongs to the weights; None without gates.
        ordinary_names: The files are called as transformers calls them: `save_pretrained` wrote them.
        dequantize: True: unpack while loading; the model is then an ordinary dense one, equal to the dense checkpoint
            bit by bit. False: layers multiply with packed weights. None: packed where this installation has kernels
            and all layers lie on the CPU; the environment variable SPARSEKIT_RUNTIME=dense|packed decides too.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        pattern: str | None = None,
        widths: Mapping[str, Any] | None = None,
        stream: Mapping[str, Any] | None = None,
        activations: Mapping[str, Any] | None = None,
        ordinary_names: bool = False,
        dequantize: bool | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.pattern = pattern
        self.widths = widths
        self.stream = stream
        self.activations = activations
        self.ordinary_names = ordinary_names
        self.dequantize = dequantize

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json says: what was given, and nothing that is not set."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


class Unpack(ConversionOps):  # type: ignore[misc]
    """Turns the parts of packed tensors into the dense tensor; what is dense already passes through."""

    def __init__(self, hf_quantizer: SparsekitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        """Copies, made for every tensor, report to the one quantizer."""
        return Unpack(self.hf_quantizer)

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **ignored: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Return pattern or name of each weight -> dense tensors, in the order of the parts' lists.

        A layer that multiplies with packed weights gets its weight here, and nothing is returned.
        """
        grouped: dict[str, dict[str, list[torch.Tensor]]] = {}
        for source, tensors in input_dict.items():
            owner, _, part = source.rpartition(".")
            grouped.setdefault(owner, {})[part] = tensors if isinstance(tensors, list) else [tensors]
        parameter = model.get_parameter_or_buffer(full_layer_name)
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if isinstance(module, SparseLinear) and self.hf_quantizer.hand_over(grouped, full_layer_name, module):
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
            return {}
        result: dict[str, list[torch.Tensor]] = {}
        for owner, parts in grouped.items():
            name = f"{owner}.weight" if owner else full_layer_name
            found = self.hf_quantizer.unpack_all(parts, owner, full_layer_name, tuple(parameter.shape))
            # transformers leaves the cast to ops that read packed tensors
            result[name] = [tensor.to(parameter.dtype) for tensor in found]
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes the dense tensor."""
        from transformers.core_model_loading import _IdentityOp

        return _IdentityOp()


class _Converter(WeightConverter):  # type: ignore[misc]
    """transformers copies a converter deeply for each of a packed tensor's parts; only what it collects is its own."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Converter:
        twin = copy.copy(self)
        twin.collected_tensors = defaultdict(list)
        twin.layer_targets = defaultdict(set)
        return twin


class SparsekitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed checkpoints; it cannot make them (`sparsekit prune` does)."""

    requires_calibration = True
    serialized_names: Mapping[str, list[str]] = {"weight": list(PARTS)}

    def __init__(self, quantization_config: SparsekitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._facts: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] = {}
        self._arrived: set[str] = set()
        self._gated: Path | None = None
        self._failed: SparsekitError | None = None
        self._shapes: Shapes = read_shapes(quantization_config.to_dict())

    def hand_over(
        self, grouped: Mapping[str, Mapping[str, list[torch.Tensor]]], name: str, module: SparseLinear
    ) -> bool:
        """Give a layer its packed weight; False where the parts are not those of one packed tensor, or are damaged.

        Args:
            grouped: Pattern of the module, empty here -> part name -> one tensor.
            name: The parameter that is loaded.
            module: Whose weight it is.
        """
        parts = grouped.get("", {})
        if self._failed is not None or set(parts) <= {"weight"} or any(len(found) != 1 for found in parts.values()):
            return False
        try:
            key = self._key(name)
            self._check_shape(key, (module.out_features, module.in_features), transposed=False)
            found = {part: tensors[0] for part, tensors in parts.items()}
            module.hold(repack(self._facts[key], found, f"{self._files[key]}: {key}", module.dtype), module.dtype)
        except SparsekitError as error:
            self._failed = error
            return False
        self._arrived.add(key)
        module._is_hf_initialized = True
        return True

    def unpack_all(
        self, parts: Mapping[str, list[torch.Tensor]], owner: str, name: str, shape: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """Return the dense tensors of lists of parts, validated; a lone `weight` is dense already.

        transformers turns an exception here into a note in a log and one of its own that tells nothing. So an error
        waits, zeros in place of the weights, for `_process_model_after_weight_loading`, which raises it: no model with
        these zeros is ever returned.

        Args:
            parts: Part name -> one tensor for each dense tensor.
            owner: Pattern of the module that experts' tensors belong to, empty for a plain parameter.
            name: The parameter that is loaded.
            shape: Its shape.
        """
        if set(parts) == {"weight"}:
            return parts["weight"]
        try:
            lengths = {part: len(found) for part, found in parts.items()}
            keys = self._experts(owner, _NUMBER.findall(name)[:1]) if owner else [self._key(name)]
            if set(lengths.values()) != {len(keys)}:
                where = f"{self._files[keys[0]]}: {keys[0]}" if keys else name
                raise IndexMismatch(
                    f"{len(keys)} packed tensors become {name}, their parts do not pair up: {lengths}", where=where
                )
            if not owner:
                self._check_shape(keys[0], shape, transposed=bool(self._facts[keys[0]].get("transposed")))
            return [
                self._unpack(key, {part: found[place] for part, found in parts.items()})
                for place, key in enumerate(keys)
            ]
        except SparsekitError as error:
            self._failed = self._failed or error
            return [torch.zeros(self._shape(owner) or shape) for _ in next(iter(parts.values()))]

    def _unpack(self, key: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight = dense(self._facts[key], parts, f"{self._files[key]}: {key}")
        self._arrived.add(key)
        return weight

    def _check_shape(self, key: str, shape: tuple[int, ...], transposed: bool) -> None:
        """Require that a packed tensor has the shape of its parameter, before memory is taken for it."""
        facts = self._facts[key]
        found, needed = facts.get("shape"), list(reversed(shape)) if transposed else list(shape)
        if found != needed:
            raise IndexMismatch(
                f"shape {found} as [outputs, inputs], the model's parameter needs {needed}",
                where=f"{self._files[key]}: {key}",
                hint="config.json and weights are not of the same model.",
            )

    def _key(self, name: str) -> str:
        """Return the file's name of a parameter; names may differ by the prefix of the base model."""
        if name in self._facts:
            return name
        near = [key for key in self._facts if name.endswith(f".{key}") or key.endswith(f".{name}")]
        if len(near) != 1:
            raise HeaderError("parts of a packed tensor without an entry in the file's metadata", where=name)
        return near[0]

    def _shape(self, owner: str) -> tuple[int, ...] | None:
        """Return the shape that most of the experts' tensors of one kind have, None without a kind."""
        shapes = Counter(
            tuple(reversed(facts["shape"]) if facts.get("transposed") else facts["shape"])
            for facts in (self._facts[key] for key in self._experts(owner))
            if owner and isinstance(facts.get("shape"), list)
        )
        return shapes.most_common(1)[0][0] if shapes else None

    def _experts(self, owner: str, layer: list[str] | None = None) -> list[str]:
        """Return the files' names of the experts that become one parameter, in the order transformers collects them.

        Args:
            owner: Such as `mlp.experts.*.up_proj`.
            layer: First number of the names, `["3"]`; None: those of all layers.
        """
        expert = ".".join(owner.split(".")[-3:])
        return sorted(
            (
                key
                for key in self._facts
                if _EXPERT.sub(".*.", key).endswith(f".{expert}.weight") and layer in (None, _NUMBER.findall(key)[:1])
            ),
            key=lambda key: [int(number) for number in _NUMBER.findall(key)],
        )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a format that this version does not know."""
        version = self.quantization_config.format_version
        if version != FORMAT_VERSION:
            raise VersionError(
                f"packed format version {version}, this sparsekit reads {FORMAT_VERSION}",
                hint="Upgrade: pip install --upgrade sparsekit",
            )
        config = self.quantization_config
        if not holds_packed(config.to_dict()):
            config.dequantize = True  # plain tensors: an ordinary model
        elif config.dequantize is None:
            config.dequantize = not _runs_packed(kwargs.get("device_map"))
        elif not config.dequantize:
            _require_packed(kwargs.get("device_map"), "dequantize=False")

    def update_device_map(self, device_map: Any) -> Any:
        """Turn "auto" into the CPU where packed layers run: they take less memory than it would reckon with."""
        return device_map if self.quantization_config.dequantize or device_map is None else {"": "cpu"}

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight files; they are not called as usual, so that nothing else loads them by mistake."""
        if not self.quantization_config.ordinary_names:
            config.transformers_weights = PACKED_INDEX
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self._shapes.plain:
            give_shapes(model, find_stack(model), self._shapes)
        if self.quantization_config.activations is not None and checkpoint_files:
            self._gated = fetch_gates(self.quantization_config.activations, Path(checkpoint_files[0]), model.config)
        opened = [PackedFile(Path(file)) for file in checkpoint_files or []]
        for file in opened:
            file.check_parts()
            self._facts |= file.facts
            self._files |= dict.fromkeys(file.facts, str(file.path))
        _require_whole(model, opened)
        if not self.quantization_config.dequantize:
            self._make_sparse(model)
        if not self._facts and holds_packed(self.quantization_config.to_dict()):
            raise IndexMismatch("the files hold no packed tensor, the configuration says they do", where=PACKED_INDEX)
        for folder in sorted({Path(file).parent for file in self._files.values()}):
            require_claims(folder, self._facts)

    def _make_sparse(self, model: Any) -> None:
        """Put SparseLinear where the model has a packed linear; fused experts are no linears and are unpacked."""
        modules = dict(model.named_modules())
        for key, facts in self._facts.items():
            name = key.removesuffix(".weight")
            wanted = Conv1D if facts.get("transposed") else torch.nn.Linear
            for known in (name, f"{model.base_model_prefix}.{name}"):
                if type(modules.get(known)) is wanted:
                    model.set_submodule(known, SparseLinear(modules[known], transposed=wanted is Conv1D))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        if self._failed is not None:
            raise self._failed
        if lost := sorted(set(self._facts) - self._arrived):
            raise IndexMismatch(
                f"its parts were not loaded ({len(lost)} of {len(self._facts)} packed tensors)",
                where=f"{self._files[lost[0]]}: {lost[0]}",
                hint="Damaged, or of another version of transformers or of the model. See: sparsekit verify DIR",
            )
        # What was loaded through packed parts is saved through the architecture's own names.
        model._weight_conversions = None
        if not self.quantization_config.dequantize:
            use_streaming(model)
            leave_files(model)
            release_freed()
        # Checkpoints of before there was `activations` say nothing of the gates that lie beside packed weights.
        folders = {Path(file).parent for file in self._files.values()} | ({self._gated} if self._gated else set())
        for folder in sorted(folders):  # forwards are what they will be
            attach_folder(model, folder, kernels=not self.quantization_config.dequantize)
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Both ways of loading unpack."""
        return {"dequantize": Unpack, "deserialize": Unpack}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Collect the parts of every plain parameter; transformers does so for fused experts itself."""
        return [_Converter(names, name, [Unpack(self)]) for name, names in self.serialized_names.items()]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Save as a dense checkpoint, an ordinary one unless it is narrow; `sparsekit convert` writes packed ones."""
        self._unpacked(model)
        return model.state_dict(), {}

    def remove_quantization_config(self, model: Any) -> None:
        """Forget the packing once there is none. Shapes belong to the model, and to what is saved of it."""
        super().remove_quantization_config(model)
        self._unpacked(model)
        if not self._shapes.plain:
            model.hf_quantizer = self

    def _unpacked(self, model: Any) -> None:
        """Let the configuration say what a dense copy of the model needs to be loaded."""
        if not self._shapes.plain:
            entry = config_entries(self._shapes)["quantization_config"]
            model.config.quantization_config = SparsekitConfig(**entry, ordinary_names=True)
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config

    def is_serializable(self) -> bool:
        """A loaded model saves as an ordinary dense checkpoint."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Put the dense layers back, `model.dequantize()`."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # text, once the model has been saved
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                model.set_submodule(name, module.dense().to(dtype))
        return model

    @property
    def is_trainable(self) -> bool:
        """Unpacked weights are ordinary parameters; packed ones have no gradient."""
        return bool(self.quantization_config.dequantize)


def _require_whole(model: Any, files: list[PackedFile]) -> None:
    """Refuse files that lack a tensor of the model, or have one of another shape or that it has no place for.

    transformers would name no reason, or warn and go on without it, a missing parameter at random.
    """
    names = {name: file for file in files for name in file.names()}
    if not names:
        return  # what holds nothing at all is refused as such
    becomes = headers.renamed(model, get_model_conversion_mapping(model), names)
    parameters = dict(model.named_parameters())
    for name, target in becomes.items():
        entry, parameter = names[name].header.tensors.get(name), parameters.get(target.names[0])
        if target.plain and entry and parameter is not None and entry.shape != tuple(parameter.shape):
            raise headers.wrong_shape(name, entry.shape, parameter.shape, names[name].path)
    folder = files[0].path.parent
    headers.require_all(model, becomes, folder)
    headers.require_no_stray(model, becomes, folder)


def _runs_packed(device_map: Any) -> bool:
    """Decide for a user who did not: packed on the CPU where the kernels are, else dense."""
    wanted = os.environ.get("SPARSEKIT_RUNTIME", "auto")
    if wanted not in ("auto", "dense", "packed"):
        raise UsageError(f"SPARSEKIT_RUNTIME={wanted}: choose auto, dense or packed")
    if wanted == "packed":
        _require_packed(device_map, "SPARSEKIT_RUNTIME=packed")
    return wanted != "dense" and _on_cpu(device_map) and native.available()


def _require_packed(device_map: Any, wish: str) -> None:
    """Refuse what cannot be run packed to a user who asked for it."""
    if not native.available():
        raise KernelsMissing(str(native.missing_reason()), hint="Load with SPARSEKIT_RUNTIME=dense.")
    if not _on_cpu(device_map):
        raise UsageError(
            f"{wish}, but device_map={device_map!r} puts layers elsewhere than on the CPU",
            hint='Load with device_map="cpu", or with SPARSEKIT_RUNTIME=dense.',
        )


def _on_cpu(device_map: Any) -> bool:
    """Whether all layers will lie on the CPU; without an accelerator "auto" and the like put them there."""
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.accelerator.is_available()
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    return all(device is None or str(device) == "cpu" for device in devices)


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a module that is loaded twice registers once
    register_quantization_config(METHOD)(SparsekitConfig)
    register_quantizer(METHOD)(SparsekitQuantizer)
