"""A model whose gate is 1 for the expert it chooses, put into a layout that weighs by probability.

Transformers' Switch multiplies by the winning probability, so it has no word for `weight="unit"`.
It has room for it all the same: scaling a router's rows changes no choice, and scaled down enough
every probability is 1/E, which a factor of E on `wo` undoes.
"""

from __future__ import annotations

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.registry import Spec

# A power of two, so that no weight is rounded. A token's weight is off by FOLD times the distance
# of its winning logit from the mean one (2.4e-3 at a distance of 10), and logits nearer to each
# other than 5e-4 are one in the float32 probabilities that transformers chooses by.
FOLD = 2.0**-12


def folded_config(config: SwitchConfig) -> SwitchConfig:
    """The config of the folded model. Raises ConfigError for one that does not weigh by 1."""
    router = Spec.parse(config.router, kind="router")
    options = {name: value for name, value in router.options.items() if name != "weight"}
    if router.name != "switch" or router.options.get("weight") != "unit" or config.router_bias:
        raise ConfigError(
            "only a router of unit weight without a bias can be folded",
            field="fold",
            expected="the router 'switch' with weight='unit'",
            found=str(router.to_json())[:80],
        )
    scale = (config.wo_scale or 1.0) * config.num_experts
    return config.replace(router=Spec("switch", options).to_json(), wo_scale=scale)


def fold_factor(name: str, num_experts: int) -> float:
    """What folding multiplies a parameter by, from its name in memory."""
    if name.endswith(".mlp.router.classifier.weight"):
        return FOLD
    return float(num_experts) if name.endswith(".mlp.experts.wo") else 1.0
