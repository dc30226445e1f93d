"""Tiny random models of every supported family, built in code: 2 to 4 blocks, hidden size 32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _without(*names: str, **changes: Any) -> dict[str, Any]:
    return {**{k: v for k, v in COMMON.items() if k not in names}, **changes}


# model_type -> keyword arguments of its configuration
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _without(),
    "mistral": _without(**SLIDING),
    "qwen2": _without("head_dim", use_sliding_window=True, max_window_layers=1, **SLIDING),
    "qwen3": _without(),
    "gemma": _without(),
    "gemma2": _without(query_pre_attn_scalar=8, **SLIDING),
    "gemma3_text": _without(query_pre_attn_scalar=8, sliding_window_pattern=2, **SLIDING),
    "phi": _without("head_dim"),
    "phi3": _without("head_dim"),
    "opt": {
        **{k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads", "head_dim")},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _without("num_key_value_heads", "head_dim"),
    "gptj": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "falcon": {**_without("intermediate_size", "num_key_value_heads", "head_dim"), "new_decoder_architecture": False},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "stablelm": _without("head_dim"),
    "olmo2": _without("head_dim"),
    "granite": _without("head_dim"),
    "cohere2": _without(sliding_window_pattern=2, **SLIDING),
    "starcoder2": _without("head_dim"),
    "smollm3": _without("head_dim"),
    "glm4": _without(),
    "nemotron": _without("head_dim"),
    "mixtral": _without(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _without("head_dim", num_experts=4, shared_expert_intermediate_size=24, **MOE),
    "qwen3_moe": _without(num_experts=4, **MOE),
    "olmoe": _without("head_dim", num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _without(num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
}
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")


def build(family: str, *, dtype: Any = None, seed: int = 0, **changes: Any) -> Any:
    """Return a random model of `family` whose linears, norms and biases are all non-trivial."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.05)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


def save(family: str, folder: Path, *, tokenizer: bool = True, **options: Any) -> Path:
    """Write a tiny model (and a byte tokenizer) as a Hugging Face folder and return it."""
    model = build(family, **options)
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per printable ASCII character: no vocabulary file needed."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocab.update({chr(code): len(vocab) + i for i, code in enumerate(range(32, 32 + VOCAB - 4))})
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def ids(samples: int = 3, length: int = 24, seed: int = 0) -> Any:
    """Return random token ids [samples, length]."""
    import torch

    return torch.randint(4, VOCAB, (samples, length), generator=torch.Generator().manual_seed(seed))


Builder = Callable[..., Any]
