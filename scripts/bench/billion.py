"""A Llama of a billion parameters with random weights: TinyLlama-1.1B's shape, as a transformers folder and as GGUF.

billion.py dense FOLDER
billion.py letters FOLDER         the same with a tokenizer of single letters: some text has to go through it
billion.py gguf FOLDER FILE
billion.py compare FOLDER LOGITS PROMPT_TOKENS    prints the relative error of llamacpp_job.py's logits
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import torch
from prompt import VOCABULARY, prompt
from safetensors.torch import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of transformers' modules, without their layer, and of GGUF's tensors."""


def write_dense(folder: Path) -> None:
    """Write the dense model in bf16, weights from a normal distribution of deviation 0.02."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)


def write_letters(folder: Path) -> None:
    """Write the dense model with a tokenizer of single letters; the folder appears when it is whole."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    half = folder.with_name("unfinished")
    write_dense(half)
    letters = {"<unk>": 0, **{chr(code): code for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(half)
    half.rename(folder)


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor of transformers' Llama."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key matrix: GGUF rotates neighbours, transformers the two halves of a head."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).transpose(1, 2).reshape(rows, cols)


def write_gguf(folder: Path, path: Path) -> None:
    """Write the dense model of `folder` as bf16 GGUF, without a vocabulary: it is for token ids."""
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(CONFIG.num_hidden_layers)
    out.add_context_length(CONFIG.max_position_embeddings)
    out.add_embedding_length(CONFIG.hidden_size)
    out.add_feed_forward_length(CONFIG.intermediate_size)
    out.add_head_count(CONFIG.num_attention_heads)
    out.add_head_count_kv(CONFIG.num_key_value_heads)
    out.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    out.add_rope_dimension_count(CONFIG.head_dim)
    out.add_rope_freq_base(CONFIG.rope_parameters["rope_theta"])
    out.add_vocab_size(CONFIG.vocab_size)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    out.add_tokenizer_model("none")
    heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            for part, count in heads.items():
                if part in name:
                    tensor = paired(tensor, count)
            if tensor.ndim == 1:
                out.add_tensor(gguf_name(name), tensor.float().numpy())
            else:
                raw = tensor.contiguous().view(torch.uint8).numpy()
                out.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def compare(folder: Path, logits: Path, count: int) -> float:
    """Return the relative error of float32 logits after a prompt of `count` tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(torch.tensor([prompt(count)]), logits_to_keep=1).logits[0, -1].float()
    got = torch.frombuffer(bytearray(logits.read_bytes()), dtype=torch.float32)
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    """Run one of the commands."""
    command, folder, *rest = sys.argv[1:]
    if command == "dense":
        write_dense(Path(folder))
    elif command == "letters":
        write_letters(Path(folder))
    elif command == "gguf":
        write_gguf(Path(folder), Path(rest[0]))
    else:
        print(compare(Path(folder), Path(rest[0]), int(rest[1])))


if __name__ == "__main__":
    main()
