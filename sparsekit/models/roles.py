"""What the linears of a family do: the one table of names, for transforms that need more than structure.

Pruning finds linears without any name. Moving channels from one linear to another does need to know which linear
makes whose inputs, so it works for the families listed here and refuses all others. Tests hold every entry to random
models: channels reordered and norm scales moved leave their outputs as they are.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparsekit.errors import UnsupportedFamily

Part = Literal["attention", "mlp"]
"""A branch of a block."""
Norm = Literal["rms", "rms_plus_one", "layer", "layer_plus_one"]
"""What the residual stream is divided by: its root mean square, or, `layer`, its deviation from its mean. The result is
scaled by the norm's weight, or by one more than that."""


@dataclass(frozen=True)
class Attention:
    """Names of an attention's linears, relative to the block; fused ones have one name.

    Attributes:
        query, key, value: What reads the residual stream.
        output: What reads the heads' outputs and writes to the stream.
        rows: Rows of a fused linear: `parts`: all queries, all keys, all values; `heads`: query, key and value of the
            first head, then of the next.
        head_norms: Norms of queries and keys inside a head, the same for all heads.
        rotary: What positions turn: `halves`: pairs of channels half a head apart; `none`: nothing. None: other pairs.
    """

    query: str
    key: str
    value: str
    output: str
    rows: Literal["whole", "parts", "heads"] = "whole"
    head_norms: tuple[str, ...] = ()
    rotary: Literal["halves", "none"] | None = None


@dataclass(frozen=True)
class MLP:
    """Names of an MLP's linears, relative to the block; `*` stands for an expert's number.

    Attributes:
        up: What reads the residual stream.
        down: What reads the elementwise activation of `up`, times `up` where there is a `gate`.
        gate: What is activated in place of `up`; None without gate.
        rows: Rows of gate and up fused into one linear: `halves` one after the other, `pairs` in turns.
    """

    up: str
    down: str
    gate: str | None = None
    rows: Literal["whole", "halves", "pairs"] = "whole"


@dataclass(frozen=True)
class Sums:
    """How a block adds the outputs of attention and MLP to the residual stream; all names are attributes of the block.

    Attributes:
        dropouts: What passes the outputs of attention and MLP on, modules or probabilities; empty: nothing does.
        factor: What both are multiplied by; empty: nothing.
        activation: What stands between the linears of an MLP that is no module of its own.
        closed: Why they cannot be replaced; empty: they can.
        same_ends: The model's code takes what leaves the last block to be as wide as what enters the first.
    """

    dropouts: tuple[str, str] = ("", "")
    factor: str = ""
    activation: str = ""
    closed: str = ""
    same_ends: bool = False


@dataclass(frozen=True)
class FamilySpec:
    """Roles of a family's modules: those of a block relative to it, the others from the model.

    Attributes:
        attention: Attention of every block.
        mlps: MLPs that a block may have; each block has at least one of them.
        attention_norm, mlp_norm: Norms that the inputs of attention and MLPs come from; None: they read the stream.
        branch_norms: Norms between a branch's last linear and the residual stream.
        routers: What else reads the output of `mlp_norm`.
        embeddings: What the residual stream starts with: tokens, learned positions.
        final_norm, head: What reads the residual stream behind the blocks.
        norm: What all norms of the residual stream are.
        scaled_embeddings: Embeddings are multiplied by the root of the stream's width.
        sums: How the branches are added to the stream.
    """

    attention: Attention
    mlps: tuple[MLP, ...]
    final_norm: str
    embeddings: tuple[str, ...]
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    branch_norms: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    head: str = "lm_head"
    norm: Norm = "rms"
    scaled_embeddings: bool = False
    sums: Sums = Sums()

    def branch(self, part: Part, names: Collection[str]) -> dict[str, bool]:
        """Return those of a block's linears that are its attention or its MLPs, and whether each ends its branch.

        Args:
            part: Which.
            names: The linears of the block, relative to it.
        """
        if part == "attention":
            a = self.attention
            found = {name: name == a.output for name in (a.query, a.key, a.value, a.output)}
        else:
            found = {name: name == mlp.down for mlp in self.mlps for name in (mlp.gate, mlp.up, mlp.down) if name}
        return {name: ends for name in names for pattern, ends in found.items() if fnmatch.fnmatchcase(name, pattern)}


_ATTENTION = Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", rotary="halves")
_IN_TURNS = replace(_ATTENTION, rotary=None)
_NORMED = replace(_ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm"))
_GATED = MLP("mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj")
_GATE_UP = MLP("mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj", rows="halves")
_EXPERTS = MLP(
    "mlp.experts.*.gate_up_proj", "mlp.experts.*.down_proj", gate="mlp.experts.*.gate_up_proj", rows="halves"
)
_SHARED = MLP("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj", gate="mlp.shared_expert.gate_proj")
_LLAMA = FamilySpec(_ATTENTION, (_GATED,), "model.norm", ("model.embed_tokens",))
_GEMMA2 = replace(
    _LLAMA,
    mlp_norm="pre_feedforward_layernorm",
    branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
_MIXTRAL = replace(_LLAMA, mlps=(_EXPERTS,), routers=("mlp.gate",))


def _fused(linear: str, output: str, rows: Literal["parts", "heads"]) -> Attention:
    return Attention(linear, linear, linear, output, rows)


FAMILIES: Mapping[str, FamilySpec] = {
    "bloom": FamilySpec(
        _fused("self_attention.query_key_value", "self_attention.dense", "heads"),
        (MLP("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),),
        "transformer.ln_f",
        ("transformer.word_embeddings",),  # with a norm of their own behind them
        norm="layer",
    ),
    "cohere2": replace(_LLAMA, attention=_IN_TURNS, mlp_norm="input_layernorm", norm="layer"),
    "gemma": replace(_LLAMA, norm="rms_plus_one", scaled_embeddings=True),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, attention=_NORMED),
    "glm4": replace(
        _LLAMA,
        attention=_IN_TURNS,
        mlps=(_GATE_UP,),
        branch_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "gpt2": FamilySpec(
        _fused("attn.c_attn", "attn.c_proj", "parts"),
        (MLP("mlp.c_fc", "mlp.c_proj"),),
        "transformer.ln_f",
        ("transformer.wte", "transformer.wpe"),
        "ln_1",
        "ln_2",
        norm="layer",
        sums=Sums(same_ends=True),
    ),
    "gpt_neox": FamilySpec(
        _fused("attention.query_key_value", "attention.dense", "heads"),
        (MLP("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),),
        "gpt_neox.final_layer_norm",
        ("gpt_neox.embed_in",),
        norm="layer",
        sums=Sums(("post_attention_dropout", "post_mlp_dropout")),
    ),
    "gpt_oss": replace(_LLAMA, mlps=(replace(_EXPERTS, rows="pairs"),), routers=("mlp.router",)),
    "gptj": FamilySpec(
        Attention("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
        (MLP("mlp.fc_in", "mlp.fc_out"),),
        "transformer.ln_f",
        ("transformer.wte",),
        "ln_1",
        "ln_1",
        norm="layer",
        sums=Sums(closed="they return attention weights beside the stream"),
    ),
    "granite": replace(_LLAMA, sums=Sums(factor="residual_multiplier")),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "mpt": FamilySpec(
        _fused("attn.Wqkv", "attn.out_proj", "parts"),
        (MLP("ffn.up_proj", "ffn.down_proj"),),
        "transformer.norm_f",
        ("transformer.wte",),
        "norm_1",
        "norm_2",
        norm="layer",
        sums=Sums(closed="their MLP adds the stream itself"),
    ),
    "nemotron": replace(_LLAMA, mlps=(replace(_GATED, gate=None),), norm="layer_plus_one"),
    "olmo2": replace(
        _LLAMA,
        attention_norm=None,
        mlp_norm=None,
        branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "olmoe": _MIXTRAL,
    "opt": FamilySpec(
        replace(_ATTENTION, output="self_attn.out_proj", rotary="none"),
        (MLP("fc1", "fc2"),),
        "model.decoder.final_layer_norm",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        "self_attn_layer_norm",  # before its branch only where config.do_layer_norm_before says so
        "final_layer_norm",
        norm="layer",
        sums=Sums(("dropout", "dropout"), activation="activation_fn"),
    ),
    "phi": replace(
        _LLAMA,
        attention=replace(
            _ATTENTION,
            output="self_attn.dense",
            head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        ),
        mlps=(MLP("mlp.fc1", "mlp.fc2"),),
        mlp_norm="input_layernorm",
        final_norm="model.final_layernorm",
        norm="layer",
        sums=Sums(("resid_dropout", "resid_dropout")),
    ),
    "phi3": replace(
        _LLAMA,
        attention=_fused("self_attn.qkv_proj", "self_attn.o_proj", "parts"),
        mlps=(_GATE_UP,),
        sums=Sums(("resid_attn_dropout", "resid_mlp_dropout")),
    ),
    "qwen2": _LLAMA,
    "qwen2_moe": replace(_MIXTRAL, mlps=(_GATED, _EXPERTS, _SHARED), routers=("mlp.gate", "mlp.shared_expert_gate")),
    "qwen3": replace(_LLAMA, attention=_NORMED),
    "qwen3_moe": replace(_MIXTRAL, attention=_NORMED, mlps=(_GATED, _EXPERTS)),
    "smollm3": _LLAMA,
    "stablelm": replace(_LLAMA, norm="layer", sums=Sums(("", "dropout"))),
    "starcoder2": replace(_LLAMA, mlps=(MLP("mlp.c_fc", "mlp.c_proj"),), norm="layer"),
}
"""Roles by `model_type`."""


def family(model: Any) -> FamilySpec:
    """Return the roles of a transformers model.

    Raises:
        UnsupportedFamily: It is not listed, or its code is its own, whatever it calls itself.
    """
    name = str(model.config.model_type)
    own_code = not type(model).__module__.startswith("transformers.models.")
    if name not in FAMILIES or own_code:
        raise UnsupportedFamily(
            f"{type(model).__name__} ({name}) is no family of which it is known what makes the inputs of its linears; "
            f"known are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]
