"""The conformance kit on a few components, short enough to be run against every seeded bug."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moezoo import routers, traces
from moezoo.adapters.checkpoint import load, save
from moezoo.building import build
from moezoo.config import SwitchConfig
from moezoo.functional.assign import best_experts, token_choice
from moezoo.recording import record
from moezoo.records import Tokens
from moezoo.routers import SwitchRouter
from moezoo.sparse_mlp import SparseMLP
from moezoo.testing import check_experts, check_loss, check_policy, check_router
from moezoo.testing.routers import router_promises
from tests.properties.small_world import admits, by_rank, by_token, rerouted, served, table, world

ROUTERS = [
    {"name": "switch", "jitter": 0.2},
    "switch",
    "top_k",
    "soft",
    "expert_choice",
    "sigmoid_top_k",
]


@pytest.mark.parametrize("spec", ROUTERS, ids=str)
def test_routers_keep_their_promises(spec: str | dict[str, object]) -> None:
    check_router(spec, examples=12)


@pytest.mark.parametrize("name", routers.names())
def test_routers_keep_their_state(name: str) -> None:
    promises = router_promises(name)
    for invariant in ("reset", "buffers", "balancing"):
        promises.verify_one(invariant, 3)


def test_a_model_keeps_what_routers_set_up_and_loads_their_state_unrounded(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2}
    config = SwitchConfig(vocab_size=11, num_experts=4, **sizes)
    noisy = build(config, router="noisy_top_k").state_dict()
    assert not any(bool(t.any()) for name, t in noisy.items() if name.endswith("noise.weight"))
    save(build(config, router="relu", seed=0), tmp_path / "model")
    for buffer in load(tmp_path / "model", dtype=torch.float16).buffers():
        assert float(buffer) == pytest.approx(1e-8)


def test_training_needs_no_default_device() -> None:
    layer, x = SparseMLP(8, 16, 4, router="base"), torch.randn(6, 8)
    torch.set_default_device("meta")
    try:
        layer(x).sum().backward()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", ["first_come", "batch_priority", "reroute", "switch"])
def test_policies_keep_their_promises(name: str) -> None:
    check_policy(name, examples=12)


@pytest.mark.parametrize("name", ["load_balance", "z", "importance"])
def test_losses_keep_their_promises(name: str) -> None:
    check_loss(name, examples=12)


@pytest.mark.parametrize("name", ["stacked", "modules"])
def test_containers_keep_their_promises(name: str) -> None:
    check_experts(name, examples=12)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_right_ones_are_kept_in_every_world(limit: int) -> None:
    w = world(4, 3, 2, padded=True)
    for order, pairs in (("rank", by_rank(w)), ("token", by_token(w))):
        expected = table(w, served(w, pairs, limit)[0])
        admits(w, expected, name="first_come", limit=limit, order=order)
    first = w.probs.gather(2, w.expert[:, :, :1])[:, :, 0]
    admits(w, table(w, served(w, by_rank(w, first), limit)[0]), name="batch_priority", limit=limit)
    seated, at = rerouted(w, limit)
    admits(w, table(w, seated, at), name="reroute", limit=limit)


def test_nan_in_padding_reaches_no_weight() -> None:
    real = torch.tensor([True, False, True])
    gate = torch.tensor([[0.7, 0.3], [float("nan"), float("nan")], [0.4, 0.6]])
    tokens = Tokens(torch.zeros(3, 4), real=real)
    a = token_choice(torch.nan_to_num(gate), gate, 1, tokens)
    assert torch.equal(a.weight, torch.tensor([0.7, 0.0, 0.6]))


def test_many_experts_are_chosen_as_few_are() -> None:
    scores = torch.randint(20, (30, 320), generator=torch.Generator().manual_seed(0)).float()
    order = scores.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(best_experts(scores, 40), order[:, :40])


@pytest.mark.parametrize("gradient", [True, False])
def test_the_weights_of_two_equal_experts_add_up(gradient: bool) -> None:
    torch.manual_seed(0)
    layer = SparseMLP(8, 16, 4, router={"name": "top_k", "k": 2}).eval()
    experts = layer.moe.experts
    with torch.no_grad():
        experts.wi[:], experts.wo[:] = experts.wi[0].clone(), experts.wo[0].clone()
    x = torch.randn(1, 12, 8)
    with torch.set_grad_enabled(gradient):
        y = layer(x)
    torch.testing.assert_close(y, (x @ experts.wi[0].t()).relu() @ experts.wo[0].t())


def test_live_weights_of_recorded_pairs_teach_the_router() -> None:
    torch.manual_seed(0)
    layer, x = SparseMLP(8, 16, 4, capacity="batch_priority").train(), torch.randn(20, 8)
    with record(layer) as tape:
        expected = layer(x)
    with traces.replay(layer, traces.of(tape), weights="live"):
        found = layer(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    gradient = layer.moe.router.classifier.weight.grad
    assert gradient is not None and bool(gradient.any())


@pytest.mark.parametrize("name", ["first_come", "batch_priority", "random_order"])
@pytest.mark.parametrize("training", [True, False])
def test_capacity_is_kept_in_training_and_outside(name: str, training: bool) -> None:
    layer = SparseMLP(8, 16, 4, capacity={"name": name, "factor": 1.0}).train(training)
    tokens = Tokens(torch.ones(16, 8))  # all of them want the same expert
    assert int(layer.moe.route(tokens).assignment.kept.sum()) == 4


@pytest.mark.parametrize(
    ("training", "eval_factor", "kept"), [(True, None, 4), (False, None, 16), (False, 1.0, 4)]
)
def test_switch_capacity_drops_in_training_and_if_asked_outside(
    training: bool, eval_factor: float | None, kept: int
) -> None:
    capacity = {"name": "switch", "factor": 1.0, "eval_factor": eval_factor}
    layer = SparseMLP(8, 16, 4, capacity=capacity).train(training)
    tokens = Tokens(torch.ones(16, 8))  # all of them want the same expert
    assert int(layer.moe.route(tokens).assignment.kept.sum()) == kept


def test_float16_weighs_before_it_rounds() -> None:
    torch.manual_seed(0)
    layer = SparseMLP(8, 16, 4, capacity="dropless").eval()
    x = torch.randn(12, 8).half()
    with torch.no_grad():
        layer.moe.router.classifier.weight.zero_()
        layer.moe.experts.wo.mul_(60_000 / layer.half()(x).float().abs().max())
        found, expected = layer(x).float(), layer.float()(x.float())
    assert expected.abs().max() > 50_000
    assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_a_unit_weight_has_a_gradient_where_others_underflow() -> None:
    router = SwitchRouter(4, 3, weight="unit")
    x = torch.full((2, 4), 1e4, requires_grad=True)
    router(Tokens(x)).assignment.weight.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
