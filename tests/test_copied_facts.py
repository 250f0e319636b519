"""What the torch-free half of the package says of components is what the components say."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch

from moezoo import capacity, config, cost, experts, routers
from moezoo.adapters import buildable, checkpoint_source
from moezoo.adapters.families import fields
from moezoo.adapters.families.switch import _component_refusal
from moezoo.adapters.upcycle import preservation
from moezoo.building import build
from moezoo.cli import info
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, MoezooError
from moezoo.functional.activations import activation
from moezoo.records import Tokens
from moezoo.registry import Spec

SIZES = {"d_model": 6, "num_experts": 4, "vocab_size": 12}
CONFIG = SwitchConfig(
    vocab_size=12, d_model=6, d_kv=3, d_ff=8, num_heads=2, num_layers=2, num_experts=4
)


def default(component: type, option: str) -> Any:
    return inspect.signature(component).parameters[option].default


def test_routers_of_a_classifier_alone_are_those_of_the_registry() -> None:
    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        state = routers.build(name, **SIZES).state_dict()
        return {key: tuple(value.shape) for key, value in state.items()}

    alone = [name for name in routers.names() if shapes(name) == {"classifier.weight": (4, 6)}]
    assert sorted(checkpoint_source._CLASSIFIERS) == alone


@pytest.mark.parametrize("name", sorted(cost._PLAIN_ROUTERS))
def test_what_a_plain_router_chooses_is_its_own_default(name: str) -> None:
    option, choices = cost._PLAIN_ROUTERS[name]
    router = routers.build(name, **SIZES)
    assert router.choices == choices
    assert option is None or default(type(router), option) == choices


@pytest.mark.parametrize(
    "spec",
    [
        {"name": name, **options}
        for name, (option, _) in cost._PLAIN_ROUTERS.items()
        for options in ({}, {"jitter": 0.1}, {option: 3} if option else {"weight": "unit"})
    ],
    ids=str,
)
def test_a_plain_layer_costs_what_it_says_when_asked(spec: dict[str, Any]) -> None:
    if set(spec) - {"name"} - set(inspect.signature(routers.registry.get(spec["name"])).parameters):
        pytest.skip(f"{spec['name']} has no such option")
    for width in (None, 5):
        container = "stacked" if width is None else {"name": "stacked", "d_ff": width}
        made = CONFIG.replace(router=spec, experts=container)
        assert cost.layer_cost(made) == cost._asked(made, 512)


def test_options_of_plain_experts_exist() -> None:
    known = set(inspect.signature(experts.registry.get("stacked")).parameters)
    assert known >= cost._PLAIN_EXPERTS
    unknown = CONFIG.replace(experts={"name": "stacked", "backend": "loop"})
    assert _component_refusal(unknown) is not None
    with pytest.raises(ConfigError, match="backend"):
        cost.layer_cost(unknown)


def test_what_is_called_buildable_builds() -> None:
    named = [{"name": "switch", "weight": weight} for weight in buildable._WEIGHTS]
    for router in ["switch", "top_k", {"name": "top_k", "k": 3}, *named]:
        spec = Spec.parse(router)
        assert buildable._is_usual(spec, 4)
        for policy in buildable._POLICIES[spec.name]:
            build(CONFIG.replace(router=router, capacity=policy), device="meta")


def test_what_cannot_be_built_is_not_called_buildable() -> None:
    for router, policy in itertools.product(routers.names(), capacity.names()):
        made = CONFIG.replace(router=router, capacity=policy)
        try:
            build(made, device="meta")
        except MoezooError:
            with pytest.raises(MoezooError):
                buildable.check_buildable(made, "conditional_generation")


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "switch"},
        {"name": "switch", "weight": "unit"},
        {"name": "top_k"},
        *(
            {"name": "top_k", "k": k, "normalize": how}
            for k in (1, 2, 3)
            for how in ("none", "before")
        ),
        {"name": "top_k", "k": 2, "softmax": "after"},
    ],
    ids=str,
)
def test_the_weights_of_a_token_add_up_to_what_preservation_divides_by(
    spec: dict[str, Any],
) -> None:
    parsed = Spec.parse(spec)
    router = routers.build(spec, **SIZES).eval()
    torch.nn.init.zeros_(router.classifier.weight)
    pairs = router(Tokens(torch.randn(1, 6), None, None, 1)).assignment
    assert pairs.num_pairs == preservation.choices_of(parsed)
    assert float(pairs.weight.detach().sum()) == pytest.approx(
        preservation._weight_total(parsed, 4)
    )


def test_info_says_what_the_usual_policy_does() -> None:
    policy, said = capacity.registry.get("switch"), info._capacity("switch")
    assert f"factor {default(policy, 'factor')} in training" in said
    assert "dropless in evaluation" in said and default(policy, "eval_factor") is None


def test_activations_have_one_list() -> None:
    for name in config.ACTIVATIONS:
        gated = activation(name)[1]
        assert CONFIG.replace(feed_forward_proj=name).is_gated == gated, name
        assert fields._WRITTEN[name][1] == gated, name
    with pytest.raises(ConfigError) as refused:
        activation("no")
    assert refused.value
    from moezoo.functional import activations

    assert set(activations._ACTIVATIONS) == set(config.ACTIVATIONS) == set(fields._WRITTEN)
