"""Every registered component keeps its promises on a GPU."""

from __future__ import annotations

from functools import partial

import pytest

import moezoo
from moezoo.testing import check_experts, check_layer, check_loss, check_policy, check_router
from tests.properties.test_components import LAYERS, ROUTER_OPTIONS, layer

PLAIN = ("switch", "first_come")
EXAMPLES = 10
# Every router with every policy; every container, which sees neither, with one of each.
PRODUCTS = [
    names
    for names in LAYERS
    if names["group"] == "batch"
    and (names["container"] == "stacked" or (names["router"], names["policy"]) == PLAIN)
]


@pytest.mark.parametrize("subject", [*moezoo.routers.names(), *ROUTER_OPTIONS], ids=str)
def test_every_router_keeps_its_promises(subject: str | dict[str, object]) -> None:
    check_router(subject, examples=EXAMPLES, device="cuda")


@pytest.mark.parametrize("name", moezoo.capacity.names())
def test_every_policy_keeps_its_promises(name: str) -> None:
    check_policy(name, examples=EXAMPLES, device="cuda")


@pytest.mark.parametrize("name", moezoo.experts.names())
def test_every_container_keeps_its_promises(name: str) -> None:
    check_experts(name, examples=EXAMPLES, device="cuda")


@pytest.mark.parametrize("name", moezoo.losses.names())
def test_every_loss_keeps_its_promises(name: str) -> None:
    check_loss(name, examples=EXAMPLES, device="cuda")


@pytest.mark.parametrize("names", PRODUCTS, ids=lambda names: "-".join(names.values()))
def test_every_product_is_a_sound_layer(names: dict[str, str]) -> None:
    check_layer(partial(layer, **names), label=str(names), examples=2, device="cuda")
