"""What a dense decoder's config.json says without a word, in the words of its sibling.

Each is a function of what config.json means: fields of the sibling, or the kinds of attention by
layer.
"""

from __future__ import annotations

from collections.abc import Callable

from moezoo.adapters.families.dense_kind import Values
from moezoo.errors import ConfigError

MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0
)


def windows_without_biases(values: Values) -> Values:
    """Of Qwen2-MoE, which has biases and no windows unless it is told."""
    return {"qkv_bias": False, "use_sliding_window": True, "max_window_layers": 0}


def no_biases(values: Values) -> Values:
    return {"use_bias": False}


def biases_of_qwen(values: Values) -> Values:
    return {"qkv_bias": values["attention_bias"], "max_window_layers": 0}


def endless_windows(values: Values) -> Values:
    """Of Cohere2-MoE, which rotates only in layers with a window, which Cohere has none of."""
    kinds = ["sliding_attention"] * values["num_hidden_layers"]
    return {"layer_types": kinds, "sliding_window": 1 << 30}


def heads_of_deepseek(values: Values) -> Values:
    """Of DeepSeek-V3, whose `head_dim` is what of a head rotates."""
    turned, wide = values["qk_rope_head_dim"], values["hidden_size"]
    return {"head_dim": turned, "qk_head_dim": turned + values["qk_nope_head_dim"],
            "initializer_range": values["initializer_range"] or 2.0 / (5.0 * wide) ** 0.5,
            }  # fmt: skip


def divided_logits(values: Values) -> Values:
    """Of GraniteMoE, which divides logits where HyperCLOVA X multiplies them."""
    scale = values["attention_multiplier"]
    factor = values["logits_scaling"]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise ConfigError("bad logits_scaling", field="logits_scaling", expected="> 0",
                          found=repr(factor)[:80])  # fmt: skip
    return {"logits_scaling": 1.0 / factor,
            "attention_multiplier": values["head_dim"] ** -0.5 if scale is None else scale,
            }  # fmt: skip


def turned_layers(values: Values) -> Values:
    """Of GraniteMoE-SWA, where a layer whose base of RoPE is 0 does not rotate."""
    rope = values.get("rope_parameters") or values
    bases = [rope["rope_theta"] * bool(turned) for turned in _turned(values)]
    used = values["use_sliding_window"] and values["sliding_window"] is not None
    return {**MULTIPLIERS, "attention_multiplier": values["head_dim"] ** -0.5,
            "layer_rope_theta": bases,
            # No layer has a window then, and its class draws the mask of one all the same.
            "sliding_window": values["sliding_window"] if used else 1 << 30}  # fmt: skip


def _turned(values: Values) -> list[int]:
    every, layers = values["no_rope_layer_interval"], range(values["num_hidden_layers"])
    return values["no_rope_layers"] or [int((layer + 1) % every != 0) for layer in layers]


def unturned_windows(values: Values) -> list[str]:
    used = values["use_sliding_window"] and values["sliding_window"] is not None
    turned = _turned(values)
    return _windows(values, lambda layer: used and not turned[layer])


def three_of_four_linear(values: Values) -> list[str]:
    every = values.get("full_attention_interval", 4)
    layers = range(values["num_hidden_layers"])
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in layers]


def wide_shared(values: Values) -> Values:
    """Of Qwen3.5-MoE, which has no word for the width of a dense layer."""
    return {"shared_expert_intermediate_size": values["intermediate_size"]}


def rounded_width(values: Values) -> int:
    """LFM2's: two thirds of what is stated, to the next multiple, where it is to be adjusted."""
    width = int(values.get("block_ff_dim") or values["intermediate_size"])
    if not values["block_auto_adjust_ff_dim"]:
        return width
    width = int(2 * width / 3)
    if values["block_ffn_dim_multiplier"] is None:
        return width
    width, unit = int(values["block_ffn_dim_multiplier"] * width), values["block_multiple_of"]
    return int(unit * ((width + unit - 1) // unit))


def width_as_it_is(values: Values) -> Values:
    """Of LFM2-MoE, which adjusts none, and has experts in the place of a list of attention."""
    _ = [values[n] for n in ("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier",
                             "block_multiple_of", "full_attn_idxs")]  # fmt: skip
    return {"intermediate_size": rounded_width(values)}


def all_but_convolutions(values: Values) -> list[str]:
    layers, listed = range(values["num_hidden_layers"]), values["full_attn_idxs"]
    return ["full_attention" if listed is None or i in listed else "conv" for i in layers]


def shared_width(values: Values) -> int:
    return int(values["shared_intermediate_size"])


def state_spaces_alone(values: Values) -> list[str]:
    """Granite 4's, under the name of old files too."""
    named = values.get("layers_block_type")
    return list(named or ["linear_attention"] * int(values["num_hidden_layers"]))


def late_windows(values: Values) -> list[str]:
    """Qwen's: windows from layer `max_window_layers` on, where they are used at all."""
    used = values.get("use_sliding_window") and values.get("sliding_window") is not None
    first = values["max_window_layers"] if used else values["num_hidden_layers"]
    return _windows(values, lambda layer: layer >= first)


def three_of_four(values: Values) -> list[str]:
    pattern = values.get("sliding_window_pattern") or 4
    return _windows(values, lambda layer: bool((layer + 1) % pattern))


def all_or_none(values: Values) -> list[str]:
    return _windows(values, lambda layer: values.get("sliding_window") is not None)


def all_but_each_fourth(values: Values) -> list[str]:
    return _windows(values, lambda layer: layer % 4 != 0)


def _windows(values: Values, sliding: Callable[[int], bool]) -> list[str]:
    layers = range(values["num_hidden_layers"])
    return ["sliding_attention" if sliding(i) else "full_attention" for i in layers]
