"""What config.json says of a decoder, dense or sparse, and what the verbs ask of it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moezoo.adapters.families.dense_decoders import DENSE
from moezoo.adapters.families.dense_kind import DenseKind
from moezoo.adapters.families.fields import gated_name
from moezoo.adapters.families.sparse_decoders import ALIASES, SPARSE, SparseKind
from moezoo.frozen import FrozenDict, frozen, thawed

_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
PLUG = (
    'moezoo.plug(model, "model.layers.*.mlp", moezoo.sparse(8)) puts experts into the model that '
    "transformers loads, and moezoo.save(model, path) keeps it."
)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's config.json, with what the planner reads under the names of a `SwitchConfig`.

    values: config.json as it is. dense_values: that of the dense model that it was made from, where
    the provenance tells it. wo_scale: the factor on every expert's `wo`, as far as it is known.
    """

    values: FrozenDict
    wo_scale: float | None = None
    dense_values: FrozenDict | None = None

    @property
    def model_type(self) -> str:
        return str(self.values["model_type"])

    @property
    def sparse_kind(self) -> SparseKind | None:
        """The row of a sparse model, None of a dense one."""
        return None if is_dense(self.values) else SPARSE.get(self.model_type)

    @property
    def dense_kind(self) -> DenseKind:
        """The row of a dense model, or of the dense one that a sparse one comes from."""
        if self.dense_values is not None:
            return DENSE[self.dense_values["model_type"]]
        return DENSE[self.model_type if self.sparse_kind is None else self.sparse_kind.dense]

    @cached_property
    def full(self) -> dict[str, Any]:
        """config.json with what its class assumes where it is silent."""
        kind, sparse = self.dense_kind, self.sparse_kind
        assumed = kind.defaults if sparse is None else {**kind.defaults, **sparse.defaults}
        stated = {n: v for n, v in self.values.items() if v is not None or n not in _ROPE}
        full = {**assumed, **stated, **(kind.fixed if sparse is None else {})}
        if full.get("num_key_value_heads") is None:
            full["num_key_value_heads"] = full["num_attention_heads"]
        if full.get("head_dim") is None:
            full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
        if sparse is None and kind.layer_types is not None and not full.get("layer_types"):
            full["layer_types"] = kind.layer_types(full)
        theta = kind.theta if sparse is None else sparse.defaults.get("rope_theta", kind.theta)
        for name, value in full.items():
            if type(value) is int and isinstance(assumed.get(name), float):
                full[name] = float(value)  # some classes read a 0 and their sibling 0.0 alone
        said = {name: full.pop(name) for name in _ROPE if name in full}
        return full | (_ropes if sparse is None and kind.ropes else _rope)(said, theta)

    @property
    def num_layers(self) -> int:
        return int(self.values["num_hidden_layers"])

    decoder_layers = num_layers

    @property
    def vocab_size(self) -> int:
        return int(self.values["vocab_size"])

    @property
    def d_model(self) -> int:
        return int(self.values["hidden_size"])

    @property
    def d_ff(self) -> int:
        """The hidden width of the dense MLP, an expert's where nothing tells of another."""
        if self.dense_values is not None:
            return DecoderConfig(self.dense_values).d_ff
        sparse = self.sparse_kind
        if sparse is None:
            return self.dense_kind.width(self.full)
        if len(self.decoder_sparse) == self.num_layers:
            return self.expert_d_ff
        wide = self.values.get(sparse.dense_width)
        return int(wide or self.values["intermediate_size"])

    @property
    def expert_d_ff(self) -> int:
        """The hidden width of an expert."""
        assert self.sparse_kind is not None
        return int(self.values[self.sparse_kind.width])

    @property
    def num_experts(self) -> int:
        kind = self.sparse_kind
        names = () if kind is None else kind.experts
        return int(next((self.values[n] for n in names if self.values.get(n) is not None), 0))

    @property
    def choices(self) -> int:
        """Experts per token; 0 of a dense model."""
        kind = self.sparse_kind
        return 0 if kind is None else int(self.values[kind.choices])

    @property
    def encoder_sparse(self) -> tuple[int, ...]:
        return ()

    @property
    def decoder_sparse(self) -> tuple[int, ...]:
        kind = self.sparse_kind
        return () if kind is None else kind.placement.read(self.values, self.num_layers)

    @property
    def shares(self) -> bool:
        """Whether sparse layers have an expert that every token passes."""
        kind = self.sparse_kind
        return kind is not None and bool(kind.shared)

    @property
    def is_gated(self) -> bool:
        return True

    @property
    def feed_forward_proj(self) -> str:
        """The MLP as a `SwitchConfig` calls it."""
        return gated_name(self.full["hidden_act"])

    @property
    def router(self) -> Any:
        """The router as a component of moezoo."""
        k = self.choices
        return {"name": "top_k", "k": k} if k > 1 else {"name": "switch", "weight": "unit"}

    @property
    def experts(self) -> Any:
        """The experts as a component of moezoo."""
        return {"name": "stacked", "d_ff": self.expert_d_ff}

    @property
    def tied(self) -> bool:
        """Whether the head is the table of embeddings."""
        return bool(self.full["tie_word_embeddings"])

    def replace(self, **changes: Any) -> DecoderConfig:
        """The config with other numbers: num_experts, choices, vocab_size, wo_scale."""
        values, kind = thawed(self.values), self.sparse_kind
        if kind is not None:
            if "num_experts" in changes:
                for name in kind.experts:
                    values.pop(name, None)
                values[kind.experts[0]] = changes.pop("num_experts")
            if "choices" in changes:
                values[kind.choices] = changes.pop("choices")
        if "vocab_size" in changes:
            values["vocab_size"] = changes.pop("vocab_size")
        return replace(self, values=frozen(values), **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"values": thawed(self.values), "wo_scale": self.wo_scale}

    def comparable(self) -> FrozenDict:
        """What two configs of models that compute the same have in common."""
        free = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
                "moezoo_provenance", "architectures", *(self.dense_kind.ignored))  # fmt: skip
        told = {name: value for name, value in self.full.items() if name not in free}
        told.pop("rope_scaling", None)
        base = told.pop("rope_theta", None)  # which new files say among the parameters
        rope = {"rope_theta": base, **told.get("rope_parameters", {})}
        rope.setdefault("rope_type", rope.pop("type", "default"))
        told["rope_parameters"] = rope
        for name, value in self.dense_kind.only.items():
            if told.get(name) == value:  # what a silent file means too
                del told[name]
        if self.sparse_kind is not None:
            self._renumber(told, self.sparse_kind)
        return FrozenDict(frozen(told))

    def _renumber(self, told: dict[str, Any], sparse: SparseKind) -> None:
        """Say once what a sparse model's class calls by several names, and no window that it has
        no layer for, as transformers writes it anew.
        """
        for name in (*sparse.experts, sparse.choices, *ALIASES):
            told.pop(name, None)
        told |= {"num_experts": self.num_experts, "choices": self.choices}
        if told.get("use_sliding_window") is False:
            told.pop("sliding_window", None)
            if set(told.get("layer_types", ())) <= {"full_attention"}:
                told.pop("layer_types", None)


def is_dense(values: Mapping[str, Any]) -> bool:
    """Whether a decoder's config.json is of a dense one; one class may be either."""
    name = values["model_type"]
    return name in DENSE and (name not in SPARSE or values.get(SPARSE[name].experts[0]) == 0)


def _rope(said: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """RoPE with the base that a file leaves to its class; as transformers 5 writes it where a file
    says more, because not every class reads an old one's `rope_scaling`, which wins in one that has
    both. What an old file says stays beside it, for transformers 4 reads nothing else.
    """
    base, old = said.get("rope_theta", theta), thawed(said.get("rope_scaling"))
    more = old or thawed(said.get("rope_parameters"))
    if not more:
        return {"rope_theta": base}
    whole = {"rope_theta": base, **more}
    kept = {"rope_theta": whole["rope_theta"], "rope_scaling": old} if old else {}
    return {"rope_parameters": whole, **kept}


def _ropes(said: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """RoPE by kind of attention, of which an old file scales full attention alone."""
    base, new = said.get("rope_theta", theta), thawed(said.get("rope_parameters")) or {}
    parts = {
        kind: {"rope_theta": base, **(new.get(kind) or {"rope_type": "default"})}
        for kind in ("full_attention", "sliding_attention")
    }
    parts["full_attention"] |= thawed(said.get("rope_scaling")) or {}
    return {"rope_theta": base, "rope_parameters": parts}
