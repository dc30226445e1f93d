"""A tokenizer with one token per byte and a random model for it, so that numbers can be computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer(*, bos: bool = False, eos: bool = True) -> Any:
    """258 tokens: <s>, </s> and one for every byte."""
    vocabulary = {"<s>": 0, "</s>": 1}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {symbol: number + 2 for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>" if eos else None
    )


def byte_model(seed: int = 0, *, scale: float = 0.3, vocabulary: int = 258) -> Any:
    """A random 2-layer Llama in float32, of weights wide enough that its predictions are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=scale,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    """Write both to `folder` and return it as text."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
