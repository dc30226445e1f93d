"""sparsekit: post-training compression of Hugging Face language models.

Importing it lets plain `from_pretrained` of transformers read packed checkpoints; `load` also skips what a checkpoint
with activation sparsity leaves out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.runtime.hook import install as _install

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__version__ = "0.1.0"

_install()


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model as `sparsekit generate` does: packed weights multiply packed, small activations are skipped.

    Plain `from_pretrained` runs a dense checkpoint with activation sparsity dense: it knows nothing of the thresholds
    beside the weights.

    Args:
        path: A checkpoint of sparsekit, any local model folder, a `.gguf` file, or a Hub id.
        options: `revision`, `dtype` (`auto`, `bf16`, `fp16`, `fp32`) and `trust_remote_code`, see
            `sparsekit.models.source.open_model`.

    Returns:
        The transformers model, in evaluation mode, no parameter trainable.

    Raises:
        ModelError, RemoteCodeRefused, UnsupportedFamily, CheckpointError: with what is wrong and what to do.
    """
    from sparsekit.models.source import open_model
    from sparsekit.progress import Silent

    return open_model(str(path), Silent(), **options).load(packed=True)
