"""The one place where names become modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moezoo import capacity as capacity_policies
from moezoo import experts as expert_containers
from moezoo import routers
from moezoo.capacity.base import CapacityPolicy
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, did_you_mean
from moezoo.experts import SharedExpert
from moezoo.layer import MoE
from moezoo.losses.base import RouterLoss
from moezoo.pairing import check_causal, fed_losses
from moezoo.registry import Spec
from moezoo.routers.base import Router


def make_moe(config: SwitchConfig, *, decoder: bool) -> MoE:
    """The sparse layer that a config describes.

    Raises ConfigError for components that do not fit, and for a pair that is not causal in a
    decoder unless `config.allow_noncausal`.
    """
    router = make_router(config.router, config)
    policy = make_capacity(config.capacity, router, expert_capacity=config.expert_capacity)
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
    shared = make_shared(
        config.shared_expert,
        d_model=config.d_model,
        d_ff=config.d_ff,
        activation=config.feed_forward_proj,
        dropout=config.dropout_rate,
    )
    group = None if config.group == SwitchConfig.group else config.group
    return MoE(router, experts, capacity=policy, shared=shared, group=group)


def make_router(spec: object, config: SwitchConfig) -> Router:
    """A router of the config's sizes. Raises ConfigError for a `router_bias` that it has not."""
    sizes: dict[str, Any] = {"d_model": config.d_model, "num_experts": config.num_experts}
    sizes["vocab_size"] = config.vocab_size
    if config.router_bias:
        name = Spec.parse(spec, kind="router").name
        if not routers.registry.takes(name, "bias"):
            reason = f"the router {name!r} has no bias"
            raise ConfigError(reason, field="router_bias", hint="Leave router_bias out.")
        sizes["bias"] = True
    return routers.build(spec, **sizes)


def make_capacity(
    spec: object | None, router: Router, *, expert_capacity: int | None = None
) -> CapacityPolicy:
    """A policy from its spec; None: "switch", or "dropless" for routers that bound the load.

    `expert_capacity` is the checkpoint's own, for a policy that asks for it.
    """
    if spec is None:
        spec = "dropless" if router.soft or router.owns_capacity else "switch"
    sizes = {} if expert_capacity is None else {"expert_capacity": expert_capacity}
    return capacity_policies.build(spec, **sizes)


def make_shared(
    options: nn.Module | Mapping[str, Any] | None,
    *,
    d_model: int,
    d_ff: int | None,
    activation: str,
    dropout: float,
) -> nn.Module | None:
    """The branch that every token takes: a module as it is, or a `SharedExpert` from its options
    (`d_ff`, `gated`, `activation`, `dropout`). Raises ConfigError for an unknown option.
    """
    if options is None or isinstance(options, nn.Module):
        return options
    if not isinstance(options, Mapping):
        wanted = "a mapping of options, or a module"
        raise ConfigError(
            "bad shared expert", field="shared_expert", expected=wanted, found=repr(options)
        )
    chosen: dict[str, Any] = {"d_ff": d_ff, "activation": activation, "dropout": dropout}
    known = [*chosen, "gated"]
    for name in options:
        if name not in known:
            reason = f"a shared expert has no option {name!r}"
            raise ConfigError(reason, field="shared_expert", hint=did_you_mean(name, known))
    chosen |= options
    return SharedExpert(d_model, chosen.pop("d_ff"), **chosen)


def make_losses(config: SwitchConfig, router: Router) -> dict[str, tuple[RouterLoss, float]]:
    """The configured router losses with their coefficients, by name; else the router's defaults.

    Raises ConfigError for a loss that the router cannot feed; the defaults are left out silently
    where they do not apply.
    """
    return fed_losses(router, config.router_losses)
