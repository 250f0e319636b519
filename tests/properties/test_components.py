"""Every registered component, and every allowed product, keeps its promises."""

from __future__ import annotations

from functools import partial

import pytest

import moezoo
from moezoo.layer import MoE
from moezoo.product_table import policy_products
from moezoo.testing import check_experts, check_loss, check_policy, check_router
from moezoo.testing.layers import layer_promises
from tests.properties.shares import NIGHTLY, share

EXAMPLES = share(8, 8)
CONTAINERS = moezoo.experts.names()
PRODUCTS = [p for p in policy_products() if not p.refused]
ROUTER_OPTIONS: list[dict[str, object]] = [
    {"name": "top_k", "k": 3, "normalize": "none"},
    {"name": "switch", "bias": True},
    {"name": "switch", "jitter": 0.1},
    {"name": "switch", "weight": "unit"},
]
RULES, ORDERS = ("switch", "flaxformer", "mesh", "vmoe"), ("rank", "token")
ACTIVATIONS = ("gelu", "gated-gelu", "gated-silu", "squared-relu")
LAYERS = [
    {"router": p.router, "policy": p.partner, "container": container, "group": group}
    for container in CONTAINERS
    for p in PRODUCTS
    for group in (("batch", "sequence") if container == "stacked" else ("batch",))
]
# State is that of the parts: enough where every router and policy meets one container.
OF_PARTS = ("reset", "buffers", "copies")
# A promise of layers is one property, whose examples all allowed products share.
LAYER_EXAMPLES = -(-NIGHTLY // len(LAYERS)) if EXAMPLES >= NIGHTLY else max(3, EXAMPLES // 8)


@pytest.mark.parametrize("name", moezoo.routers.names())
def test_every_router_keeps_its_promises(name: str) -> None:
    check_router(name, examples=EXAMPLES)


@pytest.mark.parametrize("spec", ROUTER_OPTIONS, ids=str)
def test_router_options_keep_their_promises(spec: dict[str, object]) -> None:
    check_router(spec, examples=EXAMPLES)


@pytest.mark.parametrize("name", moezoo.capacity.names())
def test_every_policy_keeps_its_promises(name: str) -> None:
    check_policy(name, examples=EXAMPLES)


def first_come(limit: int, *, rule: str, order: str) -> moezoo.capacity.CapacityPolicy:
    spec = {"name": "first_come", "rule": rule, "order": order, "factor": 0.25 * limit}
    return moezoo.capacity.build(spec)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_first_come_keeps_its_promises_under_every_rule(rule: str, order: str) -> None:
    check_policy(partial(first_come, rule=rule, order=order), examples=EXAMPLES)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_keeps_its_promises(name: str) -> None:
    check_experts(name, examples=EXAMPLES)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_stacked_experts_keep_their_promises_for_every_activation(activation: str) -> None:
    check_experts({"name": "stacked", "activation": activation}, examples=EXAMPLES)


@pytest.mark.parametrize("name", moezoo.losses.names())
def test_every_loss_keeps_its_promises(name: str) -> None:
    check_loss(name, examples=EXAMPLES)


def layer(
    d_model: int, num_experts: int, *, router: str, policy: str, container: str, group: str
) -> MoE:
    options: dict[str, object] = {"name": router}
    if "k" in moezoo.routers.registry.get(router).__init__.__annotations__:
        options["k"] = min(2, num_experts)
    if router == "gshard":
        num_experts = max(num_experts, 2)
    sizes = {"d_model": d_model, "num_experts": num_experts}
    built = moezoo.routers.build(options, **sizes, vocab_size=24)
    experts = moezoo.experts.build(container, d_ff=8, **sizes)
    admit = moezoo.capacity.build(policy)
    return MoE(built, experts, capacity=admit, group=admit.required_group or group)


@pytest.mark.parametrize("names", LAYERS, ids=lambda names: "-".join(names.values()))
def test_every_product_is_a_sound_layer(names: dict[str, str]) -> None:
    promises = layer_promises(partial(layer, **names), label=str(names))
    for name in promises.invariants:
        if name not in OF_PARTS or (names["container"], names["group"]) == ("stacked", "batch"):
            promises.verify_one(name, LAYER_EXAMPLES)
