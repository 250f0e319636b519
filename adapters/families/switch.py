"""Switch Transformers as transformers stores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moezoo.adapters.families.base import Family, Weights, registry
from moezoo.adapters.families.fields import (
    activation_refusal,
    feed_forward,
    flag,
    refuse_others,
    shared_fields,
    written_fields,
)
from moezoo.adapters.names import HEAD, SWITCH, TABLES
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.frozen import FrozenDict, thawed
from moezoo.registry import Spec

UNLIMITED = 1_000_000  # an expert capacity that no sequence reaches
_FLOAT16 = 65504.0  # the largest number
# What transformers has no word for and need not know to compute the same in evaluation.
_OWN = ("capacity", "group", "experts", "wo_scale", "initializer_scale")
# Fields of published files that transformers reads and never uses (`router_type`,
# `add_router_probs`, `router_ignore_padding_tokens`, which any value may have) or not at all. Other
# values of these stand for another function than the one that moezoo computes.
_FOLLOWED = (
    ("router_dtype", "float32", "moezoo routes in float32, as the paper does"),
    ("router_type", "tokens_masked", "in Switch tokens choose their expert"),
    ("num_selected_experts", 1, "Switch sends a token to one expert"),
    ("batch_prioritized_routing", False, "Switch serves tokens in their order"),
)


@registry.register("switch_transformers")
class SwitchFamily(Family):
    """Switch (arXiv 2101.03961) in transformers 4 and 5: experts without a gate, regular placement,
    top-1.

    `expert_capacity` there is an absolute number per sequence, in evaluation too; here the policy
    is the paper's unless you ask for `capacity="transformers"`, which takes the file's number. The
    number is written as it was read; a model that has none is written with one that never binds,
    so that transformers computes what moezoo computes. What training needs besides (policy, group,
    expert dropout, another scale of initial weights than the paper's) is kept under
    `moezoo_config`.

    `tie_word_embeddings: false` there means that outputs are not scaled, and that every table is
    a tensor of its own, which transformers 5 draws anew where a file lacks it: `copies`.
    """

    model_types = ("switch_transformers",)
    mlp = SWITCH

    def read(self, values: Mapping[str, Any], weights: Weights) -> SwitchConfig:
        for name, value, why in _FOLLOWED:
            refuse_others(values, name, value, why)
        plain = {name: v for name, v in values.items() if name != "feed_forward_proj"}
        config = SwitchConfig(
            **shared_fields(values),
            # transformers' Switch knows `dense_act_fn` alone.
            feed_forward_proj=feed_forward(plain, weights, default="relu"),
        )
        jitter = _number(values, "router_jitter_noise", 0.01, below=1.0)
        config = config.replace(
            num_experts=_whole(values, "num_experts", 8, least=1),
            encoder_sparse_layers=_layers(values, "encoder", config.num_layers),
            decoder_sparse_layers=_layers(values, "decoder", config.decoder_layers),
            router={"name": "switch", "jitter": jitter} if jitter else "switch",
            router_bias=flag(values, "router_bias", default=False),
            router_losses={
                "load_balance": _number(values, "router_aux_loss_coef", 0.001),
                "z": _number(values, "router_z_loss_coef", 0.001),
            },
            expert_capacity=_whole(values, "expert_capacity", 64, least=1),
            tie_word_embeddings=not weights.own_head,
            own_embeddings=weights.own_embeddings,
            scale_decoder_outputs=flag(values, "tie_word_embeddings", default=True),
        )
        return config.without_scale().replace(**_own_fields(values))

    def write(self, config: SwitchConfig, task: str) -> dict[str, Any]:
        losses = config.router_losses
        losses = FrozenDict(load_balance=0.01, z=0.0) if losses is None else losses
        plain = SwitchConfig(num_experts=config.num_experts, d_model=config.d_model)
        plain = plain.without_scale()
        changed = (name for name in _OWN if getattr(config, name) != getattr(plain, name))
        own = {name: thawed(getattr(config, name)) for name in changed}
        return {
            **written_fields(config, task, "SwitchTransformers"),
            **({"moezoo_config": own} if own else {}),
            "model_type": "switch_transformers",
            "tie_word_embeddings": config.scales_logits,
            "num_experts": config.num_experts,
            "num_sparse_encoder_layers": len(config.encoder_sparse),
            "num_sparse_decoder_layers": len(config.decoder_sparse),
            "encoder_sparse_step": sparse_step(config.encoder_sparse, config.num_layers),
            "decoder_sparse_step": sparse_step(config.decoder_sparse, config.decoder_layers),
            "expert_capacity": _written_capacity(config),
            "router_bias": config.router_bias,
            "router_dtype": "float32",
            "router_jitter_noise": Spec.parse(config.router).options.get("jitter", 0.0),
            "router_ignore_padding_tokens": False,
            "router_aux_loss_coef": losses.get("load_balance", 0.0),
            "router_z_loss_coef": losses.get("z", 0.0),
        }

    def refusal(self, config: SwitchConfig) -> str | None:
        if not (config.encoder_sparse or config.decoder_sparse):
            return "Switch's layout is for models with sparse layers"
        if config.is_gated:
            return f"Switch's layout has no gated experts, this model {config.feed_forward_proj}"
        if config.position_bias_every_layer:
            return "Switch's layout has one position bias per stack"
        return (
            activation_refusal(config)
            or _component_refusal(config)
            or _placement_refusal(config)
            or _head_refusal(config)
        )

    def copies(self, config: SwitchConfig, task: str) -> tuple[str, ...]:
        if config.scales_logits:
            return ()
        stacks = ("encoder",) if task == "encoder" else ("encoder", "decoder")
        tables = [TABLES[stack] for stack in stacks if stack not in config.own_embeddings]
        tied = task == "conditional_generation" and config.tie_word_embeddings
        return (*tables, HEAD) if tied else tuple(tables)


def float16_refusal(config: SwitchConfig) -> str | None:
    """Why a sparse model in float16 is not for transformers, which rounds an expert's result
    before the gate multiplies it; None where no conversion has enlarged it.
    """
    scale = config.wo_scale or 1.0
    if scale <= 1.0:
        return None
    return (
        f"in float16 transformers overflows where an expert gives more than {_FLOAT16:,.0f} before "
        f"the gate: above {_FLOAT16 / scale:,.0f} of the dense layer, whose wo is here times "
        f"{scale:g}"
    )


def sparse_step(layers: tuple[int, ...], num_layers: int) -> int | None:
    """The step with which transformers places exactly these layers, or None when none does.

    There, layer i is sparse iff step > 0 and (i % step == 1 or step == 1).
    """
    for step in range(num_layers + 1):
        if _placed(step, num_layers) == layers:
            return step
    return None


def _placed(step: int, num_layers: int) -> tuple[int, ...]:
    return tuple(i for i in range(num_layers) if step > 0 and (i % step == 1 or step == 1))


def _own_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What moezoo kept in a config.json of transformers' for itself."""
    own = values.get("moezoo_config", {})
    if not isinstance(own, dict) or set(own) - set(_OWN):
        allowed = "an object with " + ", ".join(_OWN)
        raise ConfigError(
            "moezoo_config cannot be read", field="moezoo_config", expected=allowed,
            found=repr(own)[:80],
        )  # fmt: skip
    return own


def _written_capacity(config: SwitchConfig) -> int:
    """`expert_capacity`: what the policy of transformers limits to, or what the file had said."""
    policy = Spec.parse(config.capacity or "switch")
    own: int = config.expert_capacity or UNLIMITED
    if policy.name != "transformers":
        return own
    limit: int = policy.options.get("limit") or config.expert_capacity or 64
    return limit


def _layers(values: Mapping[str, Any], side: str, num_layers: int) -> tuple[int, ...]:
    """The sparse layers of a stack: an explicit step wins over the number of sparse layers."""
    name = f"num_sparse_{side}_layers"
    count = _whole(values, name, 3, least=0)
    stated = f"{side}_sparse_step"
    if values.get(name) is not None and count > num_layers:
        wanted = f"at most {num_layers}, the {side}'s layers"
        raise ConfigError(
            f"{name}: more sparse layers than layers", field=name, expected=wanted, found=count
        )
    step = num_layers // count if count > 0 else num_layers
    return _placed(_whole(values, stated, step, least=0), num_layers)


def _whole(values: Mapping[str, Any], name: str, default: int, *, least: int) -> int:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = f"a whole number >= {least}"
        raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value)[:80])
    return value


def _number(
    values: Mapping[str, Any], name: str, default: float, *, below: float = math.inf
) -> float:
    value = values.get(name)
    if value is None:
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < below:
        wanted = "a finite number >= 0" + (f" and < {below:g}" if below < math.inf else "")
        raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value)[:80])
    return float(value)


def _component_refusal(config: SwitchConfig) -> str | None:
    router, experts = Spec.parse(config.router), Spec.parse(config.experts)
    if router.name != "switch" or set(router.options) - {"jitter", "bias"}:
        return f"Switch's layout has the plain top-1 router only, this model {router.to_json()!r}"
    if router.options.get("bias", config.router_bias) != config.router_bias:
        return "the router's bias option contradicts router_bias"
    if experts.name != "stacked" or set(experts.options) - {"dropout"}:
        return f"Switch's layout has plain experts only, this model {experts.to_json()!r}"
    if config.shared_expert is not None:
        return "Switch's layout has no shared expert"
    losses = config.router_losses or {}
    if set(losses) - {"load_balance", "z"} or any(isinstance(v, dict) for v in losses.values()):
        return f"Switch's layout has plain load_balance and z losses only, this model {losses}"
    capacity = Spec.parse(config.capacity or "switch")
    drops = capacity.name == "switch" and capacity.options.get("eval_factor") is not None
    if drops or capacity.name not in ("switch", "dropless", "transformers"):
        return f"Switch's layout has an absolute capacity only, this model {capacity.to_json()!r}"
    return None


def _placement_refusal(config: SwitchConfig) -> str | None:
    for side, layers, count in (
        ("encoder", config.encoder_sparse, config.num_layers),
        ("decoder", config.decoder_sparse, config.decoder_layers),
    ):
        if sparse_step(layers, count) is None:
            return f"Switch's layout places sparse layers in regular steps, not at {side} {layers}"
    return None


def _head_refusal(config: SwitchConfig) -> str | None:
    if config.scales_logits and not config.tie_word_embeddings:
        return "transformers' Switch does not scale the outputs of a head that is not tied"
    return None
