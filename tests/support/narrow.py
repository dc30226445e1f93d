"""Checkpoints whose blocks have different widths, written without any of the code that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparsekit.checkpoint.shapes import Shapes, Widths, config_entries
from sparsekit.models.structure import find_stack
from sparsekit.models.widths import Kept, narrow_block
from tests.support import tiny

KEPT = (
    Kept(),
    Kept(torch.tensor([1]), torch.arange(0, 48, 2)),
    Kept(neurons=torch.tensor([3, 5, 8, 20, 21, 22, 40, 41])),
)
WIDTHS = (Widths(), Widths(1, 24), Widths(None, 8))
SHAPES = Shapes(WIDTHS)


def build(family: str = "llama", kept: tuple[Kept, ...] = KEPT, **options: Any) -> Any:
    """Return a random model of a family with narrow blocks; its configuration knows nothing of them."""
    model = tiny.build(family, **options)
    for index, chosen in enumerate(kept):
        narrow_block(model, find_stack(model), index, chosen)
    return model


def write(model: Any, folder: Path, widths: tuple[Widths, ...] | Shapes = WIDTHS) -> Path:
    """Write a model of other shapes, its tokenizer and configuration as a folder, and return it."""
    shapes = widths if isinstance(widths, Shapes) else Shapes(widths)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config | config_entries(shapes)))
    tied = set(model.all_tied_weights_keys)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    name = "sparsekit_model-00001-of-00001.safetensors"
    save_file(tensors, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "sparsekit_model.safetensors.index.json").write_text(json.dumps(index))
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, **entries: Any) -> Path:
    """Change entries of a folder's quantization_config, and return the folder."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))
    return folder
