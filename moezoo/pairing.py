"""Which components fit together: every refusal is a sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moezoo.capacity.base import CapacityPolicy
from moezoo.errors import ConfigError
from moezoo.losses.base import RouterLoss, registry
from moezoo.registry import Spec
from moezoo.routers.base import Router


def pair_refusal(router: Router, policy: CapacityPolicy) -> str | None:
    """Why a router and a capacity policy cannot form a layer, or None when they can."""
    if router.soft and policy.may_drop:
        return (
            f"{_label(router)} mixes all tokens into every slot, so there is nothing that "
            f"{_label(policy)} could admit or drop"
        )
    if policy.moves and not router.has_probs:
        return f"{_label(policy)} needs probabilities, which {_label(router)} does not have"
    return None


def causality_refusal(router: Router, policy: CapacityPolicy) -> str | None:
    """Why a pair lets a decoder see the future, or None when it does not."""
    if not router.causal:
        return f"{_label(router)} chooses with a view of later tokens"
    if router.choices != 1 and not policy.causal_for_many:
        return (
            f"{_label(policy)} lets a later token's choice take the place of an earlier one's when "
            "tokens have several choices"
        )
    if not policy.causal:
        return f"{_label(policy)} ranks a token against later ones"
    return None


def loss_refusal(router: Router, loss: RouterLoss, name: str) -> str | None:
    """Why a router cannot feed a loss, or None when it can."""
    if name in router.own_losses:
        return None
    missing = {
        "logits": not router.has_logits,
        "probs": not router.has_probs,
        "assignment": router.soft,
    }
    for need in sorted(loss.needs):
        if missing.get(need, False):
            return f"loss {name!r} needs {need}, which {_label(router)} does not give"
        if need.startswith("losses.") and need.removeprefix("losses.") not in router.own_losses:
            return (
                f"loss {name!r} is computed by routers that know it, and {_label(router)} does not"
            )
    return None


def fed_losses(
    router: Router, configured: Mapping[str, Any] | None
) -> dict[str, tuple[RouterLoss, float]]:
    """The configured losses of a router with their coefficients, by name; None: its defaults.

    Raises ConfigError for a loss that the router cannot feed; the defaults are left out silently
    where they do not apply.
    """
    made: dict[str, tuple[RouterLoss, float]] = {}
    for name, setting in (router.default_losses if configured is None else configured).items():
        options = dict(setting) if isinstance(setting, Mapping) else {"coefficient": setting}
        coefficient = options.pop("coefficient", 0.0)
        loss = registry.build(Spec(name, options))
        reason = loss_refusal(router, loss, name)
        if reason is None:
            made[name] = (loss, float(coefficient))
        elif configured is not None:
            hint = f"Leave {name!r} out of router_losses."
            raise ConfigError(reason, field="router_losses", hint=hint)
    return made


def check_pair(router: Router, policy: CapacityPolicy) -> None:
    """Raise ConfigError for a pair that makes no sense."""
    reason = pair_refusal(router, policy)
    if reason:
        raise ConfigError(reason, field="capacity", hint="Use capacity='dropless'.")


def check_causal(router: Router, policy: CapacityPolicy) -> None:
    """Raise ConfigError for a pair that leaks the future into a decoder."""
    reason = causality_refusal(router, policy)
    if reason:
        hint = "Choose a causal pair, keep it out of the decoder, or pass allow_noncausal=True."
        raise ConfigError(f"not causal, in a decoder: {reason}", field="router", hint=hint)


def _label(component: object) -> str:
    return type(component).__name__
