"""Checkpoints of other kinds, named as what they are: other architectures, adapters, quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moezoo.errors import CheckpointError, ConfigError, nearest

_PLUG = (
    "moezoo reads T5, mT5, ByT5, UMT5, Switch and its own models, and upcycles the decoders of "
    'docs/stacks.md; moezoo.plug(model, "*.mlp", moezoo.sparse(8)) puts experts into a live model.'
)
_SPARSE = (
    'A mixture of experts already: transformers loads it, experts_implementation="moezoo" runs it, '
    "`moezoo report` looks into it."
)
_STACKS = "Put its config.json beside it; moezoo.plug takes the live model."
_MERGE = "Merge it into its model first: merge_and_unload() of peft, then save_pretrained."
PLUGGED = "moezoo_plugged"  # what was plugged where, in config.json
_FLOATING = "Use the model's weights in float32, bfloat16 or float16."
# Classes of transformers by how their names begin, for configs without a model_type.
_BY_CLASS = {
    "SwitchTransformers": "switch_transformers",
    "LongT5": "longt5",
    "UMT5": "umt5",
    "MT5": "mt5",
    "T5": "t5",
}
_CLASS = re.compile(rf"(?:TF|Flax)?({'|'.join(_BY_CLASS)})(?:For[A-Z]\w*|(?:Encoder)?Model)\Z")
# What the name of a tensor gives away, the surest first.
_TENSORS = (
    (re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B)\b"), "an adapter (LoRA)", _MERGE),
    (re.compile(r"\.(?:qweight|qzeros|g_idx)\Z"), "quantised weights (GPTQ or AWQ)", _FLOATING),
    (
        re.compile(r"\.(?:SCB|absmax|quant_map|weight_format)\Z|\.quant_state\."),
        "quantised weights (bitsandbytes)",
        _FLOATING,
    ),
    (
        re.compile(r"\.(?:weight_scale|weight_scale_inv|input_scale)\Z"),
        "quantised weights (fp8 or int8)",
        _FLOATING,
    ),
    (re.compile(r"\bembeddings\.word_embeddings\.weight\Z"), "BERT or its kin", _PLUG),
    (re.compile(r"\b(?:en|de)coder\.layers\.\d+\.self_attn\."), "BART or its kin", _PLUG),
    (re.compile(r"\blayers\.\d+\.self_attn\.q_proj\."), "Llama or its kin", _STACKS),
    (re.compile(r"\bh\.\d+\.(?:attn|self_attention)\."), "GPT-2 or its kin", _PLUG),
)


def refuse_plugged(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the config.json of a model that `moezoo.plug` has put experts into."""
    if PLUGGED in values:
        hint = "In Python moezoo.load(DIR) gives it, moezoo.record looks in; no command takes it."
        reason = "a model that moezoo.plug has put experts into"
        raise ConfigError(reason, field=PLUGGED, hint=hint)


def named_model_type(values: Mapping[str, Any], known: Iterable[str]) -> str:
    """The `model_type` of a config.json, or the one that its class stands for where it has none.

    Raises ConfigError naming the architecture when none is among `known`.
    """
    stated = values.get("model_type")
    classes = values.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    if stated is None and isinstance(first, str) and (match := _CLASS.match(first)):
        stated = _BY_CLASS[match[1]]
    names = list(known)
    if isinstance(stated, str) and stated in names:
        return stated
    if stated is None and first is None:
        hint = "Add the model_type, such as t5, mt5, umt5 or switch_transformers."
        raise ConfigError("config.json names no model_type", field="model_type", hint=hint)
    shown = f"model_type {repr(stated)[:40]}"
    shown += f", {first[:60]}" if isinstance(first, str) else ""
    known_class = not isinstance(first, str) or _CLASS.match(first)
    near = nearest(stated, names) if known_class else None
    sparse = any("experts" in name and type(n) is int and n > 1 for name, n in values.items())
    hint = f"Did you mean {near!r}?" if near else _SPARSE if sparse else _PLUG
    raise ConfigError("not a model of the T5 family", field="model_type", found=shown, hint=hint)


def refuse_foreign_tensors(names: Iterable[str], path: object, *, known: str = "") -> None:
    """Raise CheckpointError when the name of a tensor shows what a checkpoint is instead.

    Args:
        known: the kind that it may be.
    """
    for name in names:
        for pattern, what, hint in _TENSORS:
            if what != known and pattern.search(name):
                found = repr(name if len(name) <= 80 else name[:77] + "...")
                reason = f"this is {what}"
                raise CheckpointError(reason, path=path, key=name[:120], found=found, hint=hint)
