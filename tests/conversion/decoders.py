"""Tiny dense decoders on disk, made by transformers, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
         "rope_theta": 5000.0}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16, "rope_theta": 7000.0}  # fmt: skip
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
           "v_head_dim": 5, "num_key_value_heads": 4, "pad_token_id": None}  # fmt: skip
_LINEAR = {"head_dim": 16, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
           "linear_num_key_heads": 2, "linear_num_value_heads": 4,
           "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
GRANITE_4: dict[str, Any] = {
    "num_local_experts": 0, "shared_intermediate_size": 20, "mamba_n_heads": 4, "mamba_d_state": 8,
    "layer_types": ["linear_attention", "full_attention"], "mamba_proj_bias": True,
}  # fmt: skip
_FULL = ["full_attention", "full_attention"]
_MIXED = ["sliding_attention", "full_attention"]
_WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Each dense family as it comes, and with everything that it can say and its sibling can hold.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, scaled and tied": (
        "llama",
        {"rope_parameters": _LLAMA3, "head_dim": 8, "tie_word_embeddings": True,
         "rms_norm_eps": 1e-3, "hidden_act": "gelu"},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, windows": ("mistral", {"sliding_window": 4, "head_dim": 8}),
    "iquestcoder": ("iquestcoder", {"head_dim": 8, "rope_parameters": _YARN}),
    "internlm3": ("internlm3", {"head_dim": 8}),
    "phi3": ("phi3", {"tie_word_embeddings": True}),
    "phi3, windows": ("phi3", {"sliding_window": 4, "num_key_value_heads": 1}),
    "ministral": ("ministral", {"sliding_window": 4, "head_dim": 8}),
    "ministral, windows": (
        "ministral", {"sliding_window": 4, "layer_types": _MIXED, "head_dim": 8},
    ),
    "cwm": ("cwm", {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 4}),
    "seed_oss": ("seed_oss", {"head_dim": 8}),
    "seed_oss, no biases": ("seed_oss", {"head_dim": 8, "attention_bias": False}),
    "helium": ("helium", {"head_dim": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {**_WINDOWS, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, windows and biases": (
        "qwen3",
        {**_WINDOWS, "max_window_layers": 0, "head_dim": 8, "attention_bias": True,
         "rope_parameters": _YARN},
    ),
    "granite": ("granite", {}),
    "granite, multipliers": (
        "granite", {**_MULTIPLIERS, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "granite_swa": (
        "granite_swa",
        {**_MULTIPLIERS, "layer_types": _MIXED, "sliding_window": 4,
         "layer_rope_theta": [0.0, 500.0]},
    ),
    "granitemoehybrid": (
        "granitemoehybrid", {**_MULTIPLIERS, **GRANITE_4, "tie_word_embeddings": True},
    ),
    "granitemoehybrid, RoPE and biases": (
        "granitemoehybrid",
        {**GRANITE_4, "layer_types": _FULL, "position_embedding_type": "rope",
         "attention_bias": True},
    ),
    "olmo2": ("olmo2", {"rope_parameters": _LLAMA3}),
    "olmo3": ("olmo3", {"layer_types": _FULL, "attention_bias": True}),
    "hyperclovax": ("hyperclovax", {"use_post_norm": False}),
    "hyperclovax, multipliers": (
        "hyperclovax", {**_MULTIPLIERS, "use_post_norm": False, "attention_bias": True},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3, windows and biases": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4,
         "attention_bias": True, "rope_parameters": _YARN},
    ),
    "youtu": ("youtu", _LATENT),
    "youtu, whole queries and biases": (
        "youtu",
        {**_LATENT, "q_lora_rank": None, "attention_bias": True, "rope_interleave": False,
         "rope_parameters": {**_YARN, "mscale_all_dim": 1.0}},
    ),
    "lfm2": (
        "lfm2", {"full_attn_idxs": [1], "intermediate_size": 36, "block_multiple_of": 8},
    ),
    "lfm2, biases and a width as it is": (
        "lfm2",
        {"layer_types": ["full_attention", "conv"], "conv_bias": True, "rope_parameters": _YARN,
         "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
    ),
    "qwen3_5_text": ("qwen3_5_text", _LINEAR),
    "qwen3_5_text, biases": ("qwen3_5_text", {**_LINEAR, "attention_bias": True}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 8, "attention_bias": True}),
    "cohere": ("cohere", {"attention_bias": True, "rope_parameters": _LLAMA3}),
    "cohere2": (
        "cohere2", {"layer_types": _MIXED, "sliding_window": 4, "logit_scale": 0.5},
    ),
}  # fmt: skip


def dense_decoder(
    path: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0,
    **options: Any,
) -> Path:  # fmt: skip
    """A dense decoder of random weights that depends on all of them, saved by transformers; returns
    its directory.
    """
    model_type, own = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**SIZES, **own, **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    _enlarge(model)
    model.to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_bytes(b'{"bytes": "carried"}\n')
    return path


def _enlarge(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def loaded(path: Path) -> Any:
    """The model as transformers loads it in float32; fails for a key that is missing or strange."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    strange = {kind: names for kind, names in report.items() if names}
    assert not strange, strange
    return model.eval()


def ids(length: int = 20) -> Tensor:
    """Token ids (2, L)."""
    return torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(path: Path) -> Tensor:
    """The logits of a checkpoint on `ids`, in transformers."""
    result: Tensor = loaded(path)(ids()).logits
    return result


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return float((found - expected).norm() / expected.norm())


def edit_config(path: Path, **changes: Any) -> None:
    """Write fields of config.json anew; `...` takes one away."""
    file = path / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
