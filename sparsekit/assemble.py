"""What makes written shards a model: names, index, configuration, side files of the source."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.safetensors_file import read_header
from sparsekit.checkpoint.shapes import config_entries
from sparsekit.checkpoint.source import INDEX, PACKED_INDEX, PACKED_STEM
from sparsekit.checkpoint.staging import StagedCheckpoint
from sparsekit.prepared import Prepared
from sparsekit.prune import OUTER, checkpoint_tensors
from sparsekit.recipe.load import dump_yaml

# Weights and what only describes them, and what a run writes anew; everything else of a model folder goes along.
_NOT_SIDE_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.h5", "*.msgpack", "*.onnx", "config.json", "README.md", "sparsekit.json", "recipe.yaml", "report.json",
    "report.html", ".*",
)  # fmt: skip


def write_model_files(prepared: Prepared, staged: StagedCheckpoint, blocks: int) -> None:
    """Write what makes the shards of so many blocks a model: the outer shard, index, config, recipe, side files."""
    model, source = prepared.model, prepared.source
    last = shard_name(blocks, blocks, bool(_loading(prepared)))
    if staged.finished(OUTER) is None:
        staged.write_shard(OUTER, last, checkpoint_tensors(model, None, {}), {})
    staged.write_file(PACKED_INDEX if _loading(prepared) else INDEX, _index(staged.folder))
    staged.write_file("config.json", _config(prepared))
    staged.write_file("recipe.yaml", dump_yaml(prepared.recipe.resolved()).encode())
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_SIDE_FILES):
            staged.copy_file(path, path.name)


def is_packed(prepared: Prepared) -> bool:
    """Whether the recipe asks for packed weights, and it is time to prune some."""
    return prepared.recipe.save.format != "dense" and _prunes(prepared)


def _prunes(prepared: Prepared) -> bool:
    return bool(prepared.recipe.prunes) and not prepared.reshapes


def shard_names(prepared: Prepared) -> list[str]:
    """Return one file name per block and one for everything outside the blocks.

    Packed and narrow weights do not carry the usual name: a loader that cannot read them must not find a file, rather
    than load something wrong.
    """
    blocks, ours = prepared.model.blocks, bool(_loading(prepared))
    return [shard_name(number, blocks, ours) for number in range(blocks + 1)]


def shard_name(block: int, blocks: int, ours: bool) -> str:
    """Return the file name of a block among so many, and for `block == blocks` that of all else.

    `ours` says that the weights are packed or narrow.
    """
    return f"{PACKED_STEM if ours else 'model'}-{block + 1:05d}-of-{blocks + 1:05d}.safetensors"


def _loading(prepared: Prepared) -> dict[str, Any]:
    """Return what config.json says of weights that plain transformers cannot load; nothing for plain ones."""
    pattern = prepared.recipe.prunes[-1].pattern if is_packed(prepared) else None
    return config_entries(prepared.shapes, pattern)


def _index(folder: Path) -> bytes:
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("*model-*.safetensors")):
        for name, entry in read_header(path).tensors.items():
            weight_map[name] = path.name
            total += entry.end - entry.start
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _config(prepared: Prepared) -> bytes:
    """Return the source's config.json, with the dtype the weights now have and a note of what was done.

    A top-level key is inert in transformers and vLLM; one inside quantization_config would not be.
    """
    config = json.loads((prepared.source.folder / "config.json").read_text(encoding="utf-8"))
    config |= prepared.config
    config.pop("quantization_config", None)
    config |= _loading(prepared)
    if prepared.source.cast:
        config.pop("torch_dtype", None)
        config["dtype"] = str(prepared.source.dtype).removeprefix("torch.")
    if not _prunes(prepared):
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    stage = prepared.recipe.prunes[-1]
    config["sparsity_config"] = {
        "tool": "sparsekit",
        "recipe": prepared.recipe.name,
        "method": stage.method,
        "sparsity": stage.sparsity,
        "pattern": stage.pattern,
    }
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
