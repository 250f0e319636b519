"""Losses that only the router can compute: load (noisy_top_k) and l1 (relu)."""

from __future__ import annotations

import pytest
import torch

import moezoo
from moezoo import losses
from moezoo.errors import ConfigError
from moezoo.pairing import loss_refusal
from tests.routers.batches import batch, make


@pytest.mark.parametrize(("name", "owner"), [("load", "noisy_top_k"), ("l1", "relu")])
def test_the_loss_is_what_its_router_says(name: str, owner: str) -> None:
    routing = make(owner)(batch(9))
    assert losses.build(name)(routing) is routing.losses[name]


@pytest.mark.parametrize(("name", "owner"), [("load", "noisy_top_k"), ("l1", "relu")])
def test_every_other_router_is_refused(name: str, owner: str) -> None:
    loss = losses.build(name)
    assert loss_refusal(make(owner), loss, name) is None
    assert "SwitchRouter does not" in str(loss_refusal(make("switch"), loss, name))


@pytest.mark.parametrize("owner", ["noisy_top_k", "relu"])
def test_no_tokens_and_padding_alone_cost_zero(owner: str) -> None:
    router = make(owner)
    nothing, padding = batch(0), batch(4)
    padding = type(padding)(padding.x, padding.ids, torch.zeros(4, dtype=torch.bool))
    for tokens in (nothing, padding):
        assert [value.item() for value in router(tokens).losses.values()] == [0.0]


@pytest.mark.parametrize(
    ("router", "wanted"),
    [
        ("relu", {"l1", "z"}),
        ("noisy_top_k", {"importance", "load", "z"}),
        ("sigmoid_top_k", {"load_balance", "z"}),
        ("hash", set()),
    ],
)
def test_a_model_trains_with_its_routers_own_losses_by_default(
    router: str, wanted: set[str]
) -> None:
    config = moezoo.SwitchConfig(
        vocab_size=32,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_heads=2,
        num_layers=2,
        num_experts=2,
        router=router,
    )
    ids = torch.randint(32, (2, 5))
    out = moezoo.build(config).train()(ids, labels=ids)
    assert set(out.losses) - {"cross_entropy"} == wanted
    assert torch.isfinite(out.loss)


def test_a_loss_takes_options_from_the_config() -> None:
    config = moezoo.SwitchConfig(
        vocab_size=32,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_heads=2,
        num_layers=2,
        num_experts=2,
        router_losses={"load_balance": {"coefficient": 0.5, "scope": "sequence"}},
    )
    model = moezoo.build(config)
    assert model.router_losses.coefficients == {"load_balance": 0.5}
    assert model.router_losses.losses["load_balance"].scope == "sequence"
    assert moezoo.SwitchConfig.from_json(config.to_json()) == config


def test_options_without_a_coefficient_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be a number, or options with a coefficient"):
        moezoo.SwitchConfig(router_losses={"load_balance": {"scope": "sequence"}})
