"""The dense decoders of transformers that have a sparse sibling there: tables of names and rules.

A row says what a config.json means where it is silent, which tensors a layer has beside its MLP,
and which fields the sibling has no word for. `tests/adapters/test_decoder_tables.py` holds every
row to the classes of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]
# Sizes of a tensor, by letter: D width, V vocabulary, Q and K what queries and keys have in all
# heads, H in one, N heads.
_QKV = {
    "self_attn.q_proj.weight": "QD",
    "self_attn.k_proj.weight": "KD",
    "self_attn.v_proj.weight": "KD",
}
_ATTENTION = {**_QKV, "self_attn.o_proj.weight": "DQ"}
_QKV_BIAS = {
    "self_attn.q_proj.bias": "Q",
    "self_attn.k_proj.bias": "K",
    "self_attn.v_proj.bias": "K",
}
_ALL_BIAS = {**_QKV_BIAS, "self_attn.o_proj.bias": "D"}
_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = {"self_attn.q_norm.weight": "H", "self_attn.k_norm.weight": "H"}
_WHOLE_NORMS = {"self_attn.q_norm.weight": "Q", "self_attn.k_norm.weight": "K"}


def _nothing(values: Values) -> Values:
    return {}


def _windows_without_biases(values: Values) -> Values:
    """Of Qwen2-MoE, which has biases and no windows unless it is told."""
    return {"qkv_bias": False, "use_sliding_window": True, "max_window_layers": 0}


def _no_biases(values: Values) -> Values:
    return {"use_bias": False}


def _biases_of_qwen(values: Values) -> Values:
    return {"qkv_bias": values["attention_bias"], "max_window_layers": 0}


def _endless_windows(values: Values) -> Values:
    """Of Cohere2-MoE, which rotates only in layers with a window, which Cohere has none of."""
    kinds = ["sliding_attention"] * values["num_hidden_layers"]
    return {"layer_types": kinds, "sliding_window": 1 << 30}


@dataclass(frozen=True)
class DenseKind:
    """One dense `model_type`.

    Attributes:
        sibling: the `model_type` of the sparse one.
        norms: of a layer; mlp_norm: the one that the MLP reads, "" where it reads the stream.
        tensors: of a layer beside these and the MLP, and the letters of their sizes.
        fused: tensors on disk that hold several of these, or of the MLP, one after the other.
        biased: those that exist where the field `attention_bias` is true.
        defaults: what the class assumes where config.json is silent; theta: the base of RoPE.
        only: fields, those of RoPE among them, that the sibling has no word for, and the one value
            that needs none.
        ignored: fields that decide nothing of what it computes: no model reads them, or none but
            one in training (a dropout).
        says: fields of the sibling that follow from those of config.json.
        fixed: what is written whatever the file says, because the dense model does not read it.
        layer_types: the kinds of attention by layer that a silent config.json means.
        windows: what the sibling has of sliding windows, where layers may differ in them: "each"
            layer as it is, "one" for all layers, or "none".
    """

    model_type: str
    architecture: str
    sibling: str
    defaults: Values
    theta: float = 10_000.0
    norms: tuple[str, ...] = _PRE_NORMS
    mlp_norm: str = "post_attention_layernorm"
    tensors: Mapping[str, str] = field(default_factory=lambda: _ATTENTION)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biased: Mapping[str, str] = field(default_factory=dict)
    only: Values = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    fixed: Values = field(default_factory=dict)
    layer_types: Callable[[Values], list[str]] | None = None
    windows: str = "each"
    says: Callable[[Values], Values] = _nothing


def _late_windows(values: Values) -> list[str]:
    """Qwen's: windows from layer `max_window_layers` on, where they are used at all."""
    used = values.get("use_sliding_window") and values.get("sliding_window") is not None
    first = values["max_window_layers"] if used else values["num_hidden_layers"]
    return _windows(values, lambda layer: layer >= first)


def _three_of_four(values: Values) -> list[str]:
    pattern = values.get("sliding_window_pattern") or 4
    return _windows(values, lambda layer: bool((layer + 1) % pattern))


def _all_or_none(values: Values) -> list[str]:
    return _windows(values, lambda layer: values.get("sliding_window") is not None)


def _all_but_each_fourth(values: Values) -> list[str]:
    return _windows(values, lambda layer: layer % 4 != 0)


def _windows(values: Values, sliding: Callable[[int], bool]) -> list[str]:
    layers = range(values["num_hidden_layers"])
    return ["sliding_attention" if sliding(i) else "full_attention" for i in layers]


_ACTIVE = {"hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0}
_LLAMA = {
    **_ACTIVE,
    "num_key_value_heads": None,  # None: as many as heads
    "head_dim": None,  # None: width by heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0
)
_QWEN = {
    **_LLAMA,
    **_NO_IDS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_OLMO = {**_LLAMA, "rms_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": None,
         "eos_token_id": 50279, "attention_bias": False}  # fmt: skip
_COHERE = {**_ACTIVE, "num_key_value_heads": None, "max_position_embeddings": 8192,
           "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True,
           "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255001,
           "attention_bias": False}  # fmt: skip
_BIASES = {"attention_bias": False, "mlp_bias": False}

_KINDS = (
    DenseKind(
        "llama", "LlamaForCausalLM", "mixtral",
        defaults=_LLAMA,
        only=_BIASES,
        ignored=("pretraining_tp",),
        fixed={"sliding_window": None},
    ),
    DenseKind(
        "mistral", "MistralForCausalLM", "mixtral",
        defaults={**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                  "sliding_window": 4096},
    ),
    DenseKind(
        "iquestcoder", "LlamaForCausalLM", "mixtral",
        defaults={**_LLAMA, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
                  "max_position_embeddings": 131072},
        only=_BIASES,
        fixed={"sliding_window": None},
    ),
    DenseKind(
        "internlm3", "LlamaForCausalLM", "mixtral",
        defaults={**_LLAMA, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
                  "max_position_embeddings": 32768, "pad_token_id": 2},
        only={**_BIASES, "qkv_bias": False, "bias": False},  # the names of its own files
        fixed={"sliding_window": None},
    ),
    DenseKind(
        "phi3", "Phi3ForCausalLM", "mixtral",
        defaults={**_LLAMA, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
                  "original_max_position_embeddings": 4096, "sliding_window": None,
                  "pad_token_id": 32000, "eos_token_id": 32000},
        fused={"self_attn.qkv_proj.weight": tuple(_QKV),
               "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")},
        # Where factors of long texts begin, its generate computes the cache anew, Mixtral's not.
        only={"partial_rotary_factor": 1.0, "rope_type": "default", "type": "default"},
        ignored=("original_max_position_embeddings", "resid_pdrop", "embd_pdrop"),
    ),
    DenseKind(
        "ministral", "MinistralForCausalLM", "qwen2_moe",
        defaults={**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                  "sliding_window": 4096},
        layer_types=_all_or_none,
        says=_windows_without_biases,
    ),
    DenseKind(
        "cwm", "CwmForCausalLM", "qwen2_moe",
        defaults={**_LLAMA, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
                  "max_position_embeddings": 131072, "sliding_window": 8192,
                  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
                  "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0,
                                      "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                      "original_max_position_embeddings": 8192}},
        theta=1e6,
        only={"mlp_bias": False},
        ignored=("pretraining_tp",),
        layer_types=_all_but_each_fourth,
        says=_windows_without_biases,
    ),
    DenseKind(
        "seed_oss", "SeedOssForCausalLM", "qwen2_moe",
        defaults={**_LLAMA, "num_key_value_heads": 8, "head_dim": 128, "attention_dropout": 0.1,
                  "max_position_embeddings": 524288, "pad_token_id": 1, "bos_token_id": 0,
                  "attention_bias": True},
        biased=_QKV_BIAS,
        only={"attention_out_bias": False, "mlp_bias": False},
        ignored=("pretraining_tp", "residual_dropout"),
        fixed={"sliding_window": None, "use_sliding_window": False},
        says=_biases_of_qwen,
    ),
    DenseKind(
        "helium", "HeliumForCausalLM", "ernie4_5_moe",
        defaults={**_LLAMA, "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8,
                  "max_position_embeddings": 4096, "pad_token_id": 3},
        theta=100_000.0,
        only=_BIASES,
        ignored=("attention_dropout",),
        says=_no_biases,
    ),
    DenseKind(
        "qwen2", "Qwen2ForCausalLM", "qwen2_moe",
        defaults=_QWEN,
        tensors={**_ATTENTION, **_QKV_BIAS},
        layer_types=_late_windows,
    ),
    DenseKind(
        "qwen3", "Qwen3ForCausalLM", "qwen3_moe",
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        tensors={**_ATTENTION, **_HEAD_NORMS},
        biased=_ALL_BIAS,
        layer_types=_late_windows,
        windows="one",
    ),
    DenseKind(
        "granite", "GraniteForCausalLM", "granitemoe",
        defaults={**_LLAMA, **_MULTIPLIERS, "attention_bias": False},
        biased=_ALL_BIAS,
        only={"mlp_bias": False},
    ),
    DenseKind(
        "granite_swa", "GraniteSWAForCausalLM", "granitemoe_swa",
        defaults={**_LLAMA, **_MULTIPLIERS, "attention_bias": False, "sliding_window": 128,
                  "num_key_value_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
                  "tie_word_embeddings": True, "bos_token_id": 100257, "eos_token_id": 100257},
        tensors={**_ATTENTION, "self_attn.sinks": "N"},
        biased=_ALL_BIAS,
        only={"mlp_bias": False},
        layer_types=_all_but_each_fourth,
    ),
    DenseKind(
        "olmo2", "Olmo2ForCausalLM", "flex_olmo",
        defaults=_OLMO,
        norms=_POST_NORMS,
        mlp_norm="",
        tensors={**_ATTENTION, **_WHOLE_NORMS},
        biased=_ALL_BIAS,
    ),
    DenseKind(
        "olmo3", "Olmo3ForCausalLM", "flex_olmo",
        defaults=_OLMO,
        theta=500_000.0,
        norms=_POST_NORMS,
        mlp_norm="",
        tensors={**_ATTENTION, **_WHOLE_NORMS},
        biased=_ALL_BIAS,
        layer_types=_three_of_four,
        windows="none",
    ),
    DenseKind(
        "ernie4_5", "Ernie4_5ForCausalLM", "ernie4_5_moe",
        defaults={**_LLAMA, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
                  "max_position_embeddings": 131072, "tie_word_embeddings": True,
                  "pad_token_id": 0},
        theta=500_000.0,
        only={"use_bias": False},
    ),
    DenseKind(
        "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "hunyuan_v1_moe",
        defaults={**_LLAMA, "rms_norm_eps": 1e-5, "pad_token_id": 0, "eod_token_id": 3,
                  "attention_bias": False},
        tensors={**_ATTENTION, "self_attn.query_layernorm.weight": "H",
                 "self_attn.key_layernorm.weight": "H"},
        biased=_ALL_BIAS,
        ignored=("pretraining_tp",),
    ),
    DenseKind(
        "cohere2", "Cohere2ForCausalLM", "cohere2_moe",
        defaults={**_COHERE, "sliding_window": 4096},
        norms=("input_layernorm",),
        mlp_norm="input_layernorm",
        biased=_ALL_BIAS,
        fixed={"head_dim": None, "rms_norm_eps": None},
        layer_types=_three_of_four,
    ),
    DenseKind(
        "cohere", "CohereForCausalLM", "cohere2_moe",
        defaults={**_COHERE, "sliding_window": None},
        theta=500_000.0,
        norms=("input_layernorm",),
        mlp_norm="input_layernorm",
        biased=_ALL_BIAS,
        only={"use_qk_norm": False},
        fixed={"head_dim": None, "rms_norm_eps": None},
        says=_endless_windows,
    ),
)  # fmt: skip
DENSE = {kind.model_type: kind for kind in _KINDS}
