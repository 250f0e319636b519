"""Recipes: which parameters get which rate."""

from __future__ import annotations

import pytest

import moezoo
from moezoo.training.recipes import make_optimizer, recipe
from tests.models.tiny import tiny


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_experts_and_routers_may_have_rates_of_their_own(optimizer: str) -> None:
    model = tiny(num_experts=4, shared_expert={})
    changes = {"expert_learning_rate": 3.0, "router_learning_rate": 0.01, "learning_rate": 1e-2}
    made = make_optimizer(model, recipe("small").with_changes(optimizer=optimizer, **changes))
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        factor = 3.0 if ".experts." in name else 0.01 if ".router." in name else 1.0
        assert rates[id(parameter)] == pytest.approx(1e-2 * factor), name


def test_a_run_without_such_rates_resumes_optimizers_of_before() -> None:
    model = tiny(num_experts=4)
    groups = make_optimizer(model, recipe("small")).param_groups
    assert len(groups) == 2, "one of experts and one of the rest"


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf")])
def test_a_factor_that_trains_nothing_is_refused(rate: float) -> None:
    with pytest.raises(moezoo.MoezooError, match="router_learning_rate must be finite and > 0"):
        recipe("small").with_changes(router_learning_rate=rate)
