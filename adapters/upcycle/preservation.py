"""The factor on `wo` that makes an upcycled layer compute what the dense layer did.

With a router of equal rows every chosen expert gets the same gate weight; the factor is what undoes
the sum of those weights. Dispatch does not see it, combine does.
"""

from __future__ import annotations

from moezoo.adapters.upcycle.inits.base import ExpertInit
from moezoo.errors import ConfigError, nearest
from moezoo.registry import Spec

PRESERVE = ("exact", "none")


def router_for(init: ExpertInit, router: object, num_experts: int) -> Spec:
    """The router that an initialisation needs, from the one asked for.

    Initialisations made of slices need a fixed number of choices: `switch` becomes `top_k` with it.
    Raises ConfigError for a router that contradicts it.
    """
    spec = Spec.parse(router, kind="router")
    if spec.name == "top_k" and "k" in spec.options:
        _checkchoices_of(spec.options["k"], num_experts)
    needed = init.choices(num_experts)
    if needed is None or needed == choices_of(spec):
        return spec
    if spec.name == "switch" and not spec.options:
        return Spec("top_k", {"k": needed})
    if spec.name == "top_k" and "k" not in spec.options:
        return Spec("top_k", {**spec.options, "k": needed})
    raise ConfigError(
        f"this initialisation needs a router that chooses {needed} experts per token",
        field="router",
        expected=f"top_k with k = {needed}",
        found=spec.to_json(),
    )


def preserving_scale(init: ExpertInit, router: Spec, num_experts: int, preserve: str) -> float:
    """The factor on `wo`. Raises ConfigError when `router` has no constant one."""
    if preserve not in PRESERVE:
        raise ConfigError(
            "unknown preserve", field="preserve", expected="'exact' or 'none'", found=preserve
        )
    if preserve == "none":
        return 1.0
    total = _weight_total(router, num_experts)
    return (choices_of(router) / total) if init.sums_slices else 1.0 / total


def _checkchoices_of(choices: object, num_experts: int) -> None:
    whole = isinstance(choices, int) and not isinstance(choices, bool)
    if not whole or not 1 <= choices <= num_experts:  # type: ignore[operator]
        raise ConfigError(
            "the router's k is out of range",
            field="router",
            expected=f"a whole number from 1 to num_experts = {num_experts}",
            found=repr(choices)[:80],
        )


def choices_of(router: Spec) -> int:
    """How many experts a token goes to."""
    return int(router.options.get("k", 2)) if router.name == "top_k" else 1


def weighs_alike(router: Spec) -> bool:
    """Whether a token's weights add up to the same whatever the logits."""
    if router.name == "switch":
        return router.options.get("weight") == "unit"
    normalized = router.options.get("normalize", "before") != "none" and choices_of(router) > 1
    return router.name == "top_k" and (router.options.get("softmax") == "after" or normalized)


def _weight_total(router: Spec, num_experts: int) -> float:
    """The sum of a token's gate weights when all logits are equal."""
    if weighs_alike(router):
        return 1.0
    if router.name in ("switch", "top_k"):
        return choices_of(router) / num_experts
    near = nearest(router.name, ("switch", "top_k"))
    raise ConfigError(
        f"no factor is known that keeps the dense function under the router {router.name!r}",
        field="preserve",
        hint=(f"Did you mean {near!r}? Otherwise use" if near else "Use")
        + " the router 'switch' or 'top_k', or preserve='none'.",
    )
