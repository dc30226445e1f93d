"""A model whose blocks are loaded one at a time.

The architecture is built on the meta device (its buffers are real). Tensors arrive through transformers' own
checkpoint conversion, called with one block's tensors at a time, so that renamed weights and fused experts are what
`from_pretrained` would have made. This file is the only one that touches that internal interface (transformers
5.21 and later); tests hold it to `from_pretrained` on every family.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.shapes import Shapes, read_shapes
from sparsekit.checkpoint.source import WeightFiles
from sparsekit.errors import CheckpointError, IndexMismatch
from sparsekit.lazy import torch
from sparsekit.models import headers
from sparsekit.models.shapes import give_shapes
from sparsekit.models.structure import Stack, find_stack
from sparsekit.pack.files import PackedFile

if TYPE_CHECKING:
    from torch import Tensor, nn


class LazyModel:
    """A causal language model of which only the parts in use are in memory.

    Attributes:
        module: The transformers model; parameters that are not loaded stand on meta.
        stack: Its decoder blocks.
        shapes: In what they differ from the rest of the configuration's.
        dtype: Dtype the parameters are loaded in.

    `cast` says that the user chose that dtype, so the output is written in it too.
    """

    def __init__(
        self,
        weights: WeightFiles,
        config: Any,
        dtype: torch.dtype,
        *,
        cast: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.weights = weights
        self.dtype = dtype
        self._cast = cast
        self._config = config
        self._trust_remote_code = trust_remote_code
        with init_empty_weights(include_buffers=False):
            self.module: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                experts_implementation="eager",  # per-expert products: no padding, no grouped kernels
            )
        self.module.eval()
        self.module.requires_grad_(False)
        self.stack: Stack = find_stack(self.module)
        self.shapes: Shapes = read_shapes(getattr(config, "quantization_config", None))
        give_shapes(self.module, self.stack, self.shapes)
        self._mapping = get_model_conversion_mapping(self.module)
        self._becomes = headers.renamed(self.module, self._mapping, self.weights.tensors)
        self._keys = self._assign_keys()
        self._shards: dict[int, Path] = {}

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.stack.blocks)

    @property
    def extra(self) -> tuple[str, ...]:
        """Checkpoint tensors that the architecture has no place for; they are carried along unchanged."""
        known = self.module.state_dict().keys()
        return tuple(key for key, target in self._becomes.items() if not known & {*target.names})

    @property
    def stored(self) -> set[str]:
        """Names of the parameters that the checkpoint holds; one that is tied to another may not be among them."""
        return {name for target in self._becomes.values() for name in target.names}

    @property
    def vocabulary(self) -> int:
        """Number of token ids that have an embedding."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    def target_dtype(self, stored: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype a tensor is written in: as stored, unless the user asked for another one."""
        return self.dtype if self._cast and stored is not None and stored.is_floating_point else stored

    def keys(self, index: int | None) -> tuple[str, ...]:
        """Return the checkpoint tensor names of block `index`, or of everything outside the blocks for None."""
        return self._keys.get(index, ())

    def load_outer(self) -> None:
        """Load embeddings, final norm and head."""
        self._load(None)
        self.module.tie_weights()
        self._refuse_missing(None)

    def release_outer(self) -> None:
        """Forget everything outside the blocks."""
        blocks = {id(parameter) for block in self.stack.blocks for parameter in block.parameters()}
        for module in self.module.modules():
            _to_meta(module, except_ids=blocks)

    def load_block(self, index: int) -> nn.Module:
        """Load one block from the source, or from the shard it was redirected to."""
        self._load(index)
        self._refuse_missing(index)
        return self.stack.blocks[index]

    def release_block(self, index: int) -> None:
        """Forget one block's tensors; the mapping of its file is closed with them."""
        for module in self.stack.blocks[index].modules():
            _to_meta(module)

    def in_dtype(self, dtype: torch.dtype) -> LazyModel:
        """Return another lazy model of the same tensors, redirected blocks too, that loads them as `dtype`."""
        config = copy.deepcopy(self._config)
        other = LazyModel(self.weights, config, dtype, trust_remote_code=self._trust_remote_code)
        other._shards = dict(self._shards)
        return other

    def redirect(self, index: int, shard: Path) -> None:
        """Read block `index` from `shard` (same tensor names) from now on."""
        self._shards[index] = shard

    def origin(self, index: int | None, key: str) -> Path:
        """Return the file that holds checkpoint tensor `key`."""
        if index is not None and index in self._shards:
            return self._shards[index]
        return self.weights.folder / self.weights.tensors[key].file

    def to_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn parameters of a loaded block back into checkpoint tensors: names, and fused experts taken apart."""
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self.module, dict(tensors))
        prefix = f"{self.module.base_model_prefix}."
        known = {}
        for name, tensor in reverted.items():
            # Checkpoints of bare base models lack the prefix that the causal model's names carry.
            key = name if name in self.weights.tensors else name.removeprefix(prefix)
            if key not in self.weights.tensors:
                raise IndexMismatch(f"no tensor of this name in the source, but the pruned block has one: {name}")
            known[key] = tensor
        return known

    def new_name(self, name: str) -> str:
        """Return the name that a parameter which the checkpoint does not hold has in it."""
        prefix = f"{self.module.base_model_prefix}."
        bare = not any(key.startswith(prefix) for key in self.weights.tensors)
        return name.removeprefix(prefix) if bare else name

    def require_tensors(self) -> None:
        """Compare the headers of the weight files with the configuration; no weight is read. See `headers.check`."""
        headers.check(self.module, self.weights, self._becomes)

    def _assign_keys(self) -> dict[int | None, tuple[str, ...]]:
        """Sort the checkpoint tensors by block."""
        keys: dict[int | None, list[str]] = {}
        for key, becomes in self._becomes.items():
            owner = self.stack.owner(becomes.names[0])
            keys.setdefault(owner if owner is None or owner < len(self.stack.blocks) else None, []).append(key)
        return {owner: tuple(names) for owner, names in keys.items()}

    def _load(self, index: int | None) -> None:
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            written: PackedFile | None = None
            state: dict[str, Any] = {}
            for key in self.keys(index):
                path = self.origin(index, key)
                if index is not None and index in self._shards:  # written by this run, perhaps packed
                    written = written or PackedFile(path)
                    state[key] = written.dense(key)
                    continue
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                state[key] = files[path].get_slice(key)
            options = LoadStateDictConfig(
                dtype=self.dtype,
                dtype_plan=self.module._get_dtype_plan(self.dtype),
                weight_mapping=self._mapping,
                device_map={"": "cpu"},
            )
            info, _ = convert_and_load_state_dict_in_model(self.module, state, options)
        where = "the model" if index is None else self.stack.prefix(index)
        if info.mismatched_keys:
            name, found, needed = sorted(info.mismatched_keys)[0]
            raise headers.wrong_shape(name, found, needed, self.weights.folder)
        if info.conversion_errors:
            name, text = sorted(info.conversion_errors.items())[0]
            raise CheckpointError(f"{name} could not be converted: {text}", where=where)

    def _refuse_missing(self, index: int | None) -> None:
        owner: nn.Module = self.module if index is None else self.stack.blocks[index]
        missing = [
            name
            for name, tensor in _named_tensors(owner)
            if tensor.is_meta and (index is not None or self.stack.owner(name) is None)
        ]
        if missing:
            name = missing[0] if index is None else f"{self.stack.prefix(index)}.{missing[0]}"
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise headers.missing(f"{name}{more}", self.weights.folder)


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _to_meta(module: nn.Module, except_ids: frozenset[int] | set[int] = frozenset()) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta and id(parameter) not in except_ids:
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
