"""The sparse decoders of transformers that a dense one becomes: tables of names and rules.

Names are those of the published checkpoints, which transformers fuses while it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moezoo.adapters.families.decoder_placement import (
    ALL,
    INTERVAL,
    STEPS,
    TYPES,
    Placement,
    trailing,
)
from moezoo.adapters.families.dense_kind import LFM, PROJ
from moezoo.errors import ConfigError


@dataclass(frozen=True)
class Fused:
    """A tensor (E, parts, ...) that holds a matrix of every expert: `part` of `parts` of each."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class SparseKind:
    """One sparse `model_type`. Its router's k weights are normalised to add up to 1.

    Attributes:
        dense: the `model_type` that one of its experts makes.
        experts, choices: fields that hold their numbers; the first of `experts` is written.
        width: the field of the hidden width of an expert; dense_width: of the layers without.
        router: its tensor, `expert`: those of expert {e}, or the fused ones, by matrix.
        shared: tensors of the MLP that every token passes, none of most.
        routed, shared_scale: factors on `wo` with which the layer computes what the dense one did.
        zeros: further tensors, by what they are called here, and their sizes by letter (E, D, 1).
        added: what is added to the sum of sigmoids that divides them; a factor on all of them makes
            up for it where each is 1/2, as it is but for what a fresh router makes of it.
        fewest: experts that its router can choose among.
        sets: fields that dense models have no word for, as an upcycled model needs them.
    """

    model_type: str
    architecture: str
    dense: str
    experts: tuple[str, ...]
    choices: str
    width: str
    router: str
    expert: Mapping[str, str | Fused]
    placement: Placement = ALL
    dense_width: str = "intermediate_size"
    shared: Mapping[str, str | Fused] = field(default_factory=dict)
    shared_width: str = ""
    routed: float = 1.0
    shared_scale: float = 1.0
    zeros: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    added: float = 0.0
    fewest: int = 1
    sets: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name of the class, without what it is for."""
        return self.architecture.removesuffix("ForCausalLM")

    def check_number(self, num_experts: int) -> None:
        """Raise ConfigError where its router cannot choose among so few experts."""
        if num_experts < self.fewest:
            raise ConfigError(
                f"{self.model_type} cannot choose among fewer experts", field="num_experts",
                expected=f">= {self.fewest}", found=num_experts,
            )  # fmt: skip


# What some classes also call fields that are written under another name; no dense model reads them.
ALIASES = ("num_experts", "num_local_experts", "num_experts_per_tok", "num_mtp_layers")
_LOGGED = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_NORMALIZED = {**_LOGGED, "norm_topk_prob": True}
_EACH = {matrix: f"mlp.experts.{{e}}.{name}.weight" for matrix, name in PROJ.items()}
_GATE_UP, _DOWN = "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"
_INPUT, _OUTPUT = "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"
_LINEAR = {"wi_0": Fused(_INPUT, 0, 2), "wi_1": Fused(_INPUT, 1, 2), "wo": Fused(_OUTPUT)}
_SHARED = "shared_mlp.input_linear.weight"

_KINDS = (
    SparseKind(
        "mixtral", "MixtralForCausalLM", "mistral",
        experts=("num_local_experts", "num_experts"), choices="num_experts_per_tok",
        width="intermediate_size",
        router="block_sparse_moe.gate.weight",
        expert={m: f"block_sparse_moe.experts.{{e}}.{name}.weight" for m, name in LFM.items()},
        sets={**_LOGGED, "router_jitter_noise": 0.0},
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None,
                  "max_position_embeddings": 131072, "rope_theta": 1e6},
    ),
    SparseKind(
        "qwen2_moe", "Qwen2MoeForCausalLM", "qwen2",
        experts=("num_experts",), choices="num_experts_per_tok", width="moe_intermediate_size",
        router="mlp.gate.weight", expert=_EACH, placement=STEPS,
        shared={m: f"mlp.shared_expert.{name}.weight" for m, name in PROJ.items()},
        shared_width="shared_expert_intermediate_size",
        routed=0.5,  # the shared expert's gate at 0 is 1/2
        zeros={"shared_gate": ("mlp.shared_expert_gate.weight", "1D")},
        sets={**_NORMALIZED, "qkv_bias": True},
        defaults={"norm_topk_prob": False, "num_key_value_heads": 16},
    ),
    SparseKind(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "qwen3_5_text",
        experts=("num_experts",), choices="num_experts_per_tok", width="moe_intermediate_size",
        router="mlp.gate.weight", expert=_EACH,
        dense_width="shared_expert_intermediate_size",  # no layer is without
        shared={m: f"mlp.shared_expert.{name}.weight" for m, name in PROJ.items()},
        shared_width="shared_expert_intermediate_size",
        routed=0.5,  # as in Qwen2-MoE
        zeros={"shared_gate": ("mlp.shared_expert_gate.weight", "1D")},
        sets=_LOGGED,
        defaults={"num_key_value_heads": 2},
    ),
    SparseKind(
        "qwen3_moe", "Qwen3MoeForCausalLM", "qwen3",
        experts=("num_experts", "num_local_experts"), choices="num_experts_per_tok",
        width="moe_intermediate_size",
        router="mlp.gate.weight", expert=_EACH, placement=STEPS,
        sets=_NORMALIZED,
        defaults={"norm_topk_prob": False, "num_key_value_heads": 4, "head_dim": None},
    ),
    SparseKind(
        "granitemoe", "GraniteMoeForCausalLM", "granite",
        experts=("num_local_experts",), choices="num_experts_per_tok", width="intermediate_size",
        router="block_sparse_moe.router.layer.weight",
        expert=_LINEAR,
        sets=_LOGGED,
    ),
    SparseKind(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", "granitemoehybrid",
        experts=("num_local_experts",), choices="num_experts_per_tok", width="intermediate_size",
        router="block_sparse_moe.router.layer.weight",
        expert=_LINEAR,
        dense_width="shared_intermediate_size",  # no layer is without
        shared={"wi_0": Fused(_SHARED, 0, 2), "wi_1": Fused(_SHARED, 1, 2),
                "wo": "shared_mlp.output_linear.weight"},
        shared_width="shared_intermediate_size",
        routed=0.5, shared_scale=0.5,  # both are added, with no gate between
        sets=_LOGGED,
    ),
    SparseKind(
        "granitemoe_swa", "GraniteMoeSWAForCausalLM", "granite_swa",
        experts=("num_local_experts",), choices="num_experts_per_tok", width="intermediate_size",
        router="block_sparse_moe.router.weight",
        expert={"wi_0": Fused(_GATE_UP, 0, 2), "wi_1": Fused(_GATE_UP, 1, 2), "wo": Fused(_DOWN)},
        sets={**_LOGGED, "shared_intermediate_size": 0},
        defaults={"num_key_value_heads": None, "tie_word_embeddings": False},
    ),
    SparseKind(
        "flex_olmo", "FlexOlmoForCausalLM", "olmo2",
        experts=("num_experts",), choices="num_experts_per_tok", width="intermediate_size",
        router="mlp.gate.weight", expert=_EACH,
        sets=_NORMALIZED,
        defaults={"norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
                  "max_position_embeddings": 4096},
    ),
    SparseKind(
        "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "ernie4_5",
        experts=("moe_num_experts", "num_experts"), choices="moe_k",
        width="moe_intermediate_size",
        router="mlp.gate.weight", expert=_EACH, placement=INTERVAL,
        zeros={"classifier.correction": ("mlp.moe_statics.e_score_correction_bias", "1E")},
        sets={**_LOGGED, "moe_num_shared_experts": 0, "moe_norm_min": 1e-12},
        defaults={"moe_num_shared_experts": 2, "num_key_value_heads": 4, "head_dim": None},
    ),
    SparseKind(
        "deepseek_v3", "DeepseekV3ForCausalLM", "youtu",
        experts=("n_routed_experts", "num_local_experts"), choices="num_experts_per_tok",
        width="moe_intermediate_size",
        router="mlp.gate.weight", expert=_EACH, placement=trailing("first_k_dense_replace", 3),
        shared={m: f"mlp.shared_experts.{name}.weight" for m, name in PROJ.items()},
        shared_width="moe_intermediate_size",
        routed=0.5, shared_scale=0.5,  # both are added, with no gate between
        # Added to each expert's own sigmoid, so that twins have all of it, unlike Ernie's.
        zeros={"classifier.preference": ("mlp.gate.e_score_correction_bias", "E")},
        fewest=2,  # the best two of a group say whether it is taken
        sets={"output_router_logits": False, "norm_topk_prob": True, "n_shared_experts": 1,
              "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
              "num_nextn_predict_layers": 0, "pretraining_tp": 1},
        defaults={"num_key_value_heads": 128, "tie_word_embeddings": False,
                  "max_position_embeddings": 4096, "routed_scaling_factor": 2.5, "n_group": 8,
                  "topk_group": 4},
    ),
    SparseKind(
        "lfm2_moe", "Lfm2MoeForCausalLM", "lfm2",
        experts=("num_experts",), choices="num_experts_per_tok", width="moe_intermediate_size",
        router="feed_forward.gate.weight",
        expert={m: f"feed_forward.experts.{{e}}.{name}.weight" for m, name in LFM.items()},
        placement=trailing("num_dense_layers", 2),
        zeros={"classifier.preference": ("feed_forward.expert_bias", "E")},
        sets={"output_router_logits": False, "norm_topk_prob": True, "use_expert_bias": True,
              "routed_scaling_factor": 1.0},
        added=1e-6,
    ),
    SparseKind(
        "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "hunyuan_v1_dense",
        experts=("num_experts",), choices="moe_topk", width="intermediate_size",
        router="mlp.gate.wg.weight", expert=_EACH,
        shared={m: f"mlp.shared_mlp.{name}.weight" for m, name in PROJ.items()},
        shared_width="intermediate_size",
        routed=0.5, shared_scale=0.5,  # both are added, with no gate between
        sets={"output_router_logits": False, "sep_token_id": 4},
    ),
    SparseKind(
        "cohere2_moe", "Cohere2MoeForCausalLM", "cohere2",
        experts=("num_experts",), choices="num_experts_per_tok", width="intermediate_size",
        router="mlp.gate.weight", expert=_EACH, placement=TYPES,
        dense_width="prefix_dense_intermediate_size",
        sets={"output_router_logits": False, "norm_topk_prob": True, "num_shared_experts": 0,
              "shared_expert_combination_strategy": "average", "expert_selection_fn": "softmax",
              # At 1, layers without experts would rotate where Cohere2 does not.
              "prefix_dense_sliding_window_pattern": 4, "sliding_window_pattern": 4},
        defaults={"head_dim": 128},
    ),
)  # fmt: skip
SPARSE = {kind.model_type: kind for kind in _KINDS}
