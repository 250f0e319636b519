"""Whether the config of a planned model can be built, and from the weights that the plan writes."""

from __future__ import annotations

from moezoo.adapters.shapes import parameter_shapes
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.registry import Spec

# What these need is known without building anything, so that planning needs no torch.
_WEIGHTS = ("probability", "unit")
_POLICIES = {"switch": ("dropless", "switch", "transformers"), "top_k": ("dropless", "switch")}


def check_buildable(config: SwitchConfig, task: str) -> None:
    """Raise ConfigError for routers and policies that do not go together, or whose weights a dense
    model does not tell. Builds the model without memory unless its components are the usual ones.
    """
    router = Spec.parse(config.router, kind="router")
    policy = Spec.parse(config.capacity or "switch", kind="capacity")
    usual = policy.name in _POLICIES.get(router.name, ()) and not policy.options
    if usual and _is_usual(router, config.num_experts):
        return
    from moezoo.building import build

    needed = set(build(config, task=task, device="meta").state_dict())
    written = set(parameter_shapes(config, task))
    lacking, surplus = sorted(needed - written), sorted(written - needed)
    if lacking or surplus:
        culprit = (lacking or surplus)[0].rpartition(".mlp.")[2]
        what = f"needs {culprit!r}" if lacking else f"has no {culprit!r}"
        raise ConfigError(
            f"the router {router.name!r} {what}: a dense model does not tell its weights",
            field="router",
            expected="a router of a classifier alone, such as switch, top_k or gshard",
            hint="Build that model with moezoo.build, or plug it in with moezoo.plug.",
        )


def _is_usual(router: Spec, num_experts: int) -> bool:
    """Whether a router has a classifier alone and no option that it could refuse."""
    if router.name == "switch":
        return not set(router.options) - {"weight"} and (
            router.options.get("weight", _WEIGHTS[0]) in _WEIGHTS
        )
    return router.name == "top_k" and set(router.options) <= {"k"} and num_experts > 1
