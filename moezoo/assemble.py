"""The one place where names become modules."""

from __future__ import annotations

from typing import Any

from moezoo import capacity as capacity_policies
from moezoo import experts as expert_containers
from moezoo import losses as router_losses
from moezoo import routers
from moezoo.capacity.base import CapacityPolicy
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.layer import MoE
from moezoo.losses.base import RouterLoss
from moezoo.pairing import check_causal, loss_refusal
from moezoo.registry import Spec
from moezoo.routers.base import Router

DEFAULT_LOSSES = {"load_balance": 0.01, "z": 0.0}


def make_moe(config: SwitchConfig, *, decoder: bool) -> MoE:
    """The sparse layer that a config describes.

    Raises ConfigError for components that do not fit, and for a pair that is not causal in a
    decoder unless `config.allow_noncausal`.
    """
    router = make_router(config.router, config)
    policy = make_capacity(config.capacity, router)
    if decoder and not config.allow_noncausal:
        check_causal(router, policy)
    experts = expert_containers.build(
        config.experts,
        d_model=config.d_model,
        d_ff=config.d_ff,
        num_experts=config.num_experts,
        activation=config.feed_forward_proj,
        dropout=config.dropout_rate,
    )
    return MoE(router, experts, capacity=policy, group=config.group)


def make_router(spec: object, config: SwitchConfig) -> Router:
    """A router of the config's sizes."""
    sizes: dict[str, Any] = {"d_model": config.d_model, "num_experts": config.num_experts}
    sizes["vocab_size"] = config.vocab_size
    if config.router_bias:
        sizes["bias"] = True
    return routers.build(spec, **sizes)


def make_capacity(spec: object | None, router: Router) -> CapacityPolicy:
    """A policy from its spec; None: "switch", or "dropless" for routers that bound the load."""
    if spec is None:
        spec = "dropless" if router.soft or router.owns_capacity else "switch"
    return capacity_policies.build(spec)


def make_losses(config: SwitchConfig, router: Router) -> dict[str, tuple[RouterLoss, float]]:
    """The configured router losses with their coefficients, by name.

    Raises ConfigError for a loss that the router cannot feed; the defaults are left out silently
    where they do not apply.
    """
    chosen = DEFAULT_LOSSES if config.router_losses is None else config.router_losses
    made: dict[str, tuple[RouterLoss, float]] = {}
    for name, coefficient in chosen.items():
        loss = router_losses.build(Spec(name))
        reason = loss_refusal(router, loss, name)
        if reason is None:
            made[name] = (loss, float(coefficient))
        elif config.router_losses is not None:
            raise ConfigError(
                reason, field="router_losses", hint=f"Leave {name!r} out of router_losses."
            )
    return made
