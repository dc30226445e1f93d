"""The parts of the benchmark that need torch, run as children by sparsekit's Python: `sparsekit_jobs.py JOB ARGUMENTS`.

ids MODEL SAMPLES LENGTH FILE     write the folder of a model (unpacked if it is a GGUF) and its calibration ids
deep FOLDER BLOCKS                write a random Llama of equal blocks, in shards, with a tokenizer of bytes
load FOLDER                       load a whole model and read all of it, to see what that takes
masks OURS THEIRS OUT             compare two pruned checkpoints with each other
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HIDDEN, INTERMEDIATE = 1024, 2816


def ids(model: str, samples: str, length: str, out: str) -> None:
    """Write the ids that `sparsekit prune` calibrates on, from its own code."""
    from sparsekit.data import TextSpec, load_blocks
    from sparsekit.models.source import open_model
    from sparsekit.progress import Silent
    from sparsekit.recipe.load import load_recipe

    wanted = {"source": "builtin", "samples": samples, "sequence_length": length}
    settings = [f"calibration.{key}={value}" for key, value in wanted.items()]
    spec = TextSpec(**load_recipe("wanda-50", settings).calibration.model_dump())
    source = open_model(model, Silent())
    blocks = load_blocks(spec, source.tokenizer, model_max_length=source.max_length, part="calibration")
    found = {"folder": str(source.folder), "ids": blocks.ids.tolist(), "fingerprint": blocks.fingerprint}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def deep(folder: str, blocks: str) -> None:
    """Write a random Llama whose blocks are big enough to be seen in the resident memory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {symbol: number + 1 for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=int(blocks),
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60MB")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def load(folder: str) -> None:
    """Load a model as a tool that holds all of it does, before any work."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    print(sum(float(parameter.sum()) for parameter in model.parameters()))


def masks(ours: str, theirs: str, out: str) -> None:
    """Write how many target weights are zero in each of two checkpoints, and the share of equal mask bits."""
    from safetensors import safe_open

    targets = json.loads(Path(ours, "sparsekit.json").read_text(encoding="utf-8"))["tensors"]
    pruned = sorted(name for name, facts in targets.items() if facts.get("method"))
    our_files, their_files = _files(ours), _files(theirs)
    total = equal = zeros_ours = zeros_theirs = 0
    for name in pruned:
        with safe_open(our_files[name], framework="pt") as one, safe_open(their_files[name], framework="pt") as other:
            mine, foreign = one.get_tensor(name) == 0, other.get_tensor(name) == 0
        total += mine.numel()
        equal += int((mine == foreign).sum())
        zeros_ours += int(mine.sum())
        zeros_theirs += int(foreign.sum())
    facts = {
        "tensors": len(pruned),
        "sparsity_ours": zeros_ours / total,
        "sparsity_theirs": zeros_theirs / total,
        "equal_mask_bits": equal / total,
    }
    Path(out).write_text(json.dumps(facts), encoding="utf-8")


def _files(folder: str) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint."""
    from safetensors import safe_open

    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


if __name__ == "__main__":
    {"ids": ids, "deep": deep, "load": load, "masks": masks}[sys.argv[1]](*sys.argv[2:])
