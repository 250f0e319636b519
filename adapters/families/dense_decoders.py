"""The dense decoders of transformers that have a sparse sibling there: tables of names and rules.

A row says what a config.json means where it is silent, which tensors a layer has beside its MLP,
and which fields the sibling has no word for. `tests/adapters/test_decoder_tables.py` holds every
row to the classes of transformers.
"""

from __future__ import annotations

from moezoo.adapters.families.decoder_rules import (
    MULTIPLIERS,
    all_but_convolutions,
    all_but_each_fourth,
    all_or_none,
    biases_of_qwen,
    divided_logits,
    endless_windows,
    heads_of_deepseek,
    late_windows,
    no_biases,
    rounded_width,
    three_of_four,
    three_of_four_linear,
    turned_layers,
    unturned_windows,
    wide_shared,
    width_as_it_is,
    windows_without_biases,
)
from moezoo.adapters.families.dense_kind import ATTENTION, LFM, QKV, DenseKind
from moezoo.adapters.families.mixers import gated_delta, latent_attention, short_convolutions

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
        fused={"self_attn.qkv_proj.weight": tuple(QKV),
               "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")},
        # Where factors of long texts begin, its generate computes the cache anew, Mixtral's not.
        only={"partial_rotary_factor": 1.0, "rope_type": "default", "type": "default"},
        ignored=("original_max_position_embeddings", "resid_pdrop", "embd_pdrop"),
    ),
    DenseKind(
        "ministral", "MinistralForCausalLM", "qwen2_moe",
        defaults={**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                  "sliding_window": 4096},
        layer_types=all_or_none,
        says=windows_without_biases,
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
        layer_types=all_but_each_fourth,
        says=windows_without_biases,
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
        says=biases_of_qwen,
    ),
    DenseKind(
        "helium", "HeliumForCausalLM", "ernie4_5_moe",
        defaults={**_LLAMA, "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8,
                  "max_position_embeddings": 4096, "pad_token_id": 3},
        theta=100_000.0,
        only=_BIASES,
        ignored=("attention_dropout",),
        says=no_biases,
    ),
    DenseKind(
        "qwen2", "Qwen2ForCausalLM", "qwen2_moe",
        defaults=_QWEN,
        tensors={**ATTENTION, **_QKV_BIAS},
        layer_types=late_windows,
    ),
    DenseKind(
        "qwen3", "Qwen3ForCausalLM", "qwen3_moe",
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        tensors={**ATTENTION, **_HEAD_NORMS},
        biased=_ALL_BIAS,
        layer_types=late_windows,
        windows="one",
    ),
    DenseKind(
        "granite", "GraniteForCausalLM", "granitemoe",
        defaults={**_LLAMA, **MULTIPLIERS, "attention_bias": False},
        biased=_ALL_BIAS,
        only={"mlp_bias": False},
    ),
    DenseKind(
        "granite_swa", "GraniteSWAForCausalLM", "granitemoe_swa",
        defaults={**_LLAMA, **MULTIPLIERS, "attention_bias": False, "sliding_window": 128,
                  "num_key_value_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
                  "tie_word_embeddings": True, "bos_token_id": 100257, "eos_token_id": 100257},
        tensors={**ATTENTION, "self_attn.sinks": "N"},
        biased=_ALL_BIAS,
        only={"mlp_bias": False},
        layer_types=all_but_each_fourth,
    ),
    DenseKind(
        "olmo2", "Olmo2ForCausalLM", "flex_olmo",
        defaults=_OLMO,
        norms=_POST_NORMS,
        mlp_norm="",
        tensors={**ATTENTION, **_WHOLE_NORMS},
        biased=_ALL_BIAS,
    ),
    DenseKind(
        "olmo3", "Olmo3ForCausalLM", "flex_olmo",
        defaults=_OLMO,
        theta=500_000.0,
        norms=_POST_NORMS,
        mlp_norm="",
        tensors={**ATTENTION, **_WHOLE_NORMS},
        biased=_ALL_BIAS,
        layer_types=three_of_four,
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
        tensors={**ATTENTION, "self_attn.query_layernorm.weight": "H",
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
        layer_types=three_of_four,
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
        says=endless_windows,
    ),
    DenseKind(
        "hyperclovax", "HyperCLOVAXForCausalLM", "granitemoe",
        defaults={**_LLAMA, **MULTIPLIERS, "attention_multiplier": None, "attention_bias": False,
                  "use_post_norm": True},
        biased=_ALL_BIAS,
        only={"use_post_norm": False, "mlp_bias": False},
        says=divided_logits,
    ),
    DenseKind(
        "smollm3", "SmolLM3ForCausalLM", "granitemoe_swa",
        defaults={**_LLAMA, "num_key_value_heads": 4, "max_position_embeddings": 32768,
                  "tie_word_embeddings": True, "pad_token_id": 128004, "bos_token_id": 128000,
                  "eos_token_id": 128001, "use_sliding_window": False, "sliding_window": None,
                  "no_rope_layers": None, "no_rope_layer_interval": 4, "attention_bias": False},
        theta=2_000_000.0,
        biased=_ALL_BIAS,
        # A sink so low takes nothing from any token, and its gradient is 0.
        fills={"self_attn.sinks": ("N", -16384.0)},
        only={"mlp_bias": False},
        layer_types=unturned_windows,
        says=turned_layers,
    ),
    DenseKind(
        "youtu", "YoutuForCausalLM", "deepseek_v3",
        defaults={**_LLAMA, "num_key_value_heads": 16, "max_position_embeddings": 131072,
                  "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
                  "initializer_range": None, "kv_lora_rank": 512, "q_lora_rank": 1536,
                  "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
                  "rope_interleave": True, "attention_bias": False},
        mixer=latent_attention,
        numbers=("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim"),
        ignored=("embedding_initializer_range",),
        says=heads_of_deepseek,
    ),
    DenseKind(
        "lfm2", "Lfm2ForCausalLM", "lfm2_moe",
        defaults={"hidden_act": "silu", "initializer_range": 0.02, "norm_eps": 1e-5,
                  "num_key_value_heads": 8, "max_position_embeddings": 128_000,
                  "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1,
                  "eos_token_id": 2, "conv_bias": False, "conv_L_cache": 3,
                  "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
                  "block_auto_adjust_ff_dim": True, "full_attn_idxs": None},
        theta=1_000_000.0,
        norms=("operator_norm", "ffn_norm"),
        mlp_norm="ffn_norm",
        mlp="feed_forward",
        matrix=LFM,
        last_norm="model.embedding_norm",
        width=rounded_width,
        plain={"block_auto_adjust_ff_dim": False},
        mixer=short_convolutions,
        numbers=("conv_L_cache", "block_multiple_of"),
        only={"tie_embedding": True},  # what its own files call it
        layer_types=all_but_convolutions,
        says=width_as_it_is,
    ),
    DenseKind(
        "qwen3_5_text", "Qwen3_5ForCausalLM", "qwen3_5_moe_text",
        defaults={**_LLAMA, **_NO_IDS, "num_key_value_heads": 4, "head_dim": 256,
                  "max_position_embeddings": 32768, "attention_bias": False,
                  "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
                  "linear_value_head_dim": 128, "linear_num_key_heads": 16,
                  "linear_num_value_heads": 32},
        mixer=gated_delta,
        numbers=("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
                 "linear_num_key_heads", "linear_num_value_heads"),
        layer_types=three_of_four_linear,
        says=wide_shared,
    ),
)  # fmt: skip
DENSE = {kind.model_type: kind for kind in _KINDS}
