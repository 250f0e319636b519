"""What a row of the table of dense decoders says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moezoo.adapters.families.mixers import Mixer

Values = Mapping[str, Any]
# Sizes of a tensor, by letter: D width, V vocabulary, Q and K what queries and keys have in all
# heads, H in one, N heads.
QKV = {
    "self_attn.q_proj.weight": "QD",
    "self_attn.k_proj.weight": "KD",
    "self_attn.v_proj.weight": "KD",
}
ATTENTION = {**QKV, "self_attn.o_proj.weight": "DQ"}
PROJ = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
LFM = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}


def _stated_width(values: Values) -> int:
    return int(values["intermediate_size"])


@dataclass(frozen=True)
class DenseKind:
    """One dense `model_type`.

    Attributes:
        sibling: the `model_type` of the sparse one.
        norms: of a layer; mlp_norm: the one that the MLP reads, "" where it reads the stream.
        mlp, matrix: where the MLP is in a layer, and what its matrices are called; last_norm: the
            norm before the head.
        width: the hidden width of the MLP; plain: what a
            config.json must say beside the width, if it is written anew; stated: where it says it.
        tensors: of a layer beside these and the MLP, and the letters of their sizes.
        fused: tensors on disk that hold several of these, or of the MLP, one after the other.
        biased: those that exist where the field `attention_bias` is true.
        defaults: what the class assumes where config.json is silent; theta: the base of RoPE.
        only: fields, those of RoPE among them, that the sibling has no word for, and the one value
            that needs none.
        ignored: fields that decide nothing of what it computes: no model reads them, or none but
            one in training (a dropout).
        older: what old files call a field.
        says: fields of the sibling that follow from those of config.json.
        fixed: what is written whatever the file says, because the dense model does not read it.
        mixer: the tensors, where they are not the same in all layers or have other sizes, in the
            place of `tensors` and `biased`; numbers: the fields that it takes sizes from.
        fills: tensors that the sibling has besides in every layer, the letters of their sizes, and
            the number in all places with which they do nothing.
        layer_types: the kinds of attention by layer that a silent config.json means.
        windows: what the sibling has of sliding windows, where layers may differ in them: "each"
            layer as it is, "one" for all layers, or "none".
        ropes: whether `rope_parameters` has a rotation for each kind of attention.
    """

    model_type: str
    architecture: str
    sibling: str
    defaults: Values
    theta: float = 10_000.0
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    mlp_norm: str = "post_attention_layernorm"
    tensors: Mapping[str, str] = field(default_factory=lambda: ATTENTION)
    mlp: str = "mlp"
    matrix: Mapping[str, str] = field(default_factory=lambda: PROJ)
    last_norm: str = "model.norm"
    width: Callable[[Values], int] = _stated_width
    stated: str = "intermediate_size"
    plain: Values = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biased: Mapping[str, str] = field(default_factory=dict)
    mixer: Mixer | None = None
    numbers: tuple[str, ...] = ()
    fills: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    only: Values = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)
    fixed: Values = field(default_factory=dict)
    layer_types: Callable[[Values], list[str]] | None = None
    windows: str = "each"
    ropes: bool = False
    says: Callable[[Values], Values] = lambda values: {}
