"""What some decoders have in a layer in the place of plain attention: names on disk and shapes.

Each is a function of what config.json means and of the layer's number. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moezoo.adapters.shapes import Shape

Values = Mapping[str, Any]
Mixer = Callable[[Values, int], dict[str, Shape]]


def latent_attention(values: Values, layer: int) -> dict[str, Shape]:
    """Attention whose queries, keys and values come from few numbers (DeepSeek-V2, 2024)."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    keys, rank = values["kv_lora_rank"], values.get("q_lora_rank")
    turned, plain, out = (values[f"{n}_head_dim"] for n in ("qk_rope", "qk_nope", "v"))
    query = heads * (plain + turned)
    shapes: dict[str, Shape] = {
        "kv_a_proj_with_mqa.weight": (keys + turned, width),
        "kv_a_layernorm.weight": (keys,),
        "kv_b_proj.weight": (heads * (plain + out), keys),
        "o_proj.weight": (width, heads * out),
    }
    if rank is None:
        shapes["q_proj.weight"] = (query, width)
    else:
        shapes |= {"q_a_proj.weight": (rank, width), "q_a_layernorm.weight": (rank,),
                   "q_b_proj.weight": (query, rank)}  # fmt: skip
    if values["attention_bias"]:
        biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
        shapes |= {f"{n}.bias": shapes[f"{n}.weight"][:1] for n in biased
                   if f"{n}.weight" in shapes}  # fmt: skip
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def gated_delta(values: Values, layer: int) -> dict[str, Shape]:
    """Gated attention in some layers, gated delta networks (Yang et al., 2024) in the others."""
    width, head = values["hidden_size"], values["head_dim"]
    queries, keys = (values[f"num_{n}_heads"] * head for n in ("attention", "key_value"))
    if values["layer_types"][layer] == "full_attention":
        shapes: dict[str, Shape] = {
            "q_proj.weight": (2 * queries, width),  # with the gates
            "k_proj.weight": (keys, width),
            "v_proj.weight": (keys, width),
            "o_proj.weight": (width, queries),
        }
        if values["attention_bias"]:
            shapes |= {n.replace("weight", "bias"): s[:1] for n, s in list(shapes.items())}
        shapes |= {"q_norm.weight": (head,), "k_norm.weight": (head,)}
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}
    heads, size = values["linear_num_value_heads"], values["linear_value_head_dim"]
    value = heads * size
    mixed = 2 * values["linear_num_key_heads"] * values["linear_key_head_dim"] + value
    shapes = {
        "dt_bias": (heads,),
        "A_log": (heads,),
        "conv1d.weight": (mixed, 1, values["linear_conv_kernel_dim"]),
        "norm.weight": (size,),
        "out_proj.weight": (width, value),
        "in_proj_qkv.weight": (mixed, width),
        "in_proj_z.weight": (value, width),
        "in_proj_b.weight": (heads, width),
        "in_proj_a.weight": (heads, width),
    }
    return {f"linear_attn.{name}": shape for name, shape in shapes.items()}


def short_convolutions(values: Values, layer: int) -> dict[str, Shape]:
    """Attention in some layers, gated short convolutions (LFM2, 2025) in the others."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head = width // heads  # whatever head_dim says
    queries, keys = heads * head, values["num_key_value_heads"] * head
    if values["layer_types"][layer] != "conv":
        shapes: dict[str, Shape] = {
            "q_proj.weight": (queries, width),
            "k_proj.weight": (keys, width),
            "v_proj.weight": (keys, width),
            "out_proj.weight": (width, queries),
            "q_layernorm.weight": (head,),
            "k_layernorm.weight": (head,),
        }
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}
    shapes = {
        "conv.weight": (width, 1, values["conv_L_cache"]),
        "in_proj.weight": (3 * width, width),
        "out_proj.weight": (width, width),
    }
    if values["conv_bias"]:
        shapes |= {n.replace("weight", "bias"): s[:1] for n, s in list(shapes.items())}
    return {f"conv.{name}": shape for name, shape in shapes.items()}


def state_spaces(values: Values, layer: int) -> dict[str, Shape]:
    """Attention in some layers, Mamba-2 (Dao and Gu, 2024) in the others."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if values["layer_types"][layer] not in ("linear_attention", "mamba"):
        queries, keys = heads * (width // heads), values["num_key_value_heads"] * (width // heads)
        shapes: dict[str, Shape] = {
            "q_proj.weight": (queries, width),
            "k_proj.weight": (keys, width),
            "v_proj.weight": (keys, width),
            "o_proj.weight": (width, queries),
        }
        if values["attention_bias"]:
            shapes |= {n.replace("weight", "bias"): s[:1] for n, s in list(shapes.items())}
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}
    states, inner = values["mamba_n_heads"], values["mamba_expand"] * width
    mixed = inner + 2 * values["mamba_n_groups"] * values["mamba_d_state"]
    shapes = {
        "dt_bias": (states,),
        "A_log": (states,),
        "D": (states,),
        "conv1d.weight": (mixed, 1, values["mamba_d_conv"]),
        "in_proj.weight": (inner + mixed + states, width),
        "norm.weight": (inner,),
        "out_proj.weight": (width, inner),
    }
    if values["mamba_conv_bias"]:
        shapes["conv1d.bias"] = (mixed,)
    if values["mamba_proj_bias"]:
        shapes |= {f"{n}_proj.bias": shapes[f"{n}_proj.weight"][:1] for n in ("in", "out")}
    return {f"mamba.{name}": shape for name, shape in shapes.items()}
