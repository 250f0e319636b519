"""Cosine routing: scores are cosines over a learned temperature."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import moezoo
from moezoo.records import Tokens
from tests.routers.batches import batch, make, pairs, sparse


def test_logits_equal_cosines_over_the_temperature() -> None:
    tokens, router = batch(7), make("cosine", low_dim=3)
    low = tokens.x @ router.projection.weight.T
    embeddings = router.classifier.weight
    routing = router(tokens)
    assert routing.logits is not None
    for t in range(7):
        for e in range(4):
            wanted = F.cosine_similarity(low[t], embeddings[e], dim=0) / 0.07
            assert torch.allclose(routing.logits[t, e], wanted, atol=1e-4)


def test_length_of_a_token_does_not_matter() -> None:
    tokens, router = batch(20), make("cosine", k=2)
    short, long = router(tokens), router(Tokens(tokens.x * 1000))
    assert pairs(short) == pairs(long)
    assert torch.allclose(sparse(short).weight, sparse(long).weight, atol=1e-5)


def test_temperature_never_falls_below_a_hundredth() -> None:
    router = make("cosine")
    with torch.no_grad():
        router.temperature.fill_(-1.0)
    routing = router(batch(5))
    assert routing.logits is not None
    assert routing.logits.abs().max() <= 100.0 + 1e-3


def test_a_token_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(2, 6, requires_grad=True)
    sparse(make("cosine")(Tokens(x))).weight.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("name", "number"), [("cosine", "temperature"), ("soft", "scale")])
def test_a_number_that_was_saved_without_a_dimension_is_loaded(name: str, number: str) -> None:
    layer = moezoo.SparseMLP(8, 16, 4, router=name)
    state = layer.state_dict()
    state[f"moe.router.{number}"] = torch.tensor(0.5)
    layer.load_state_dict(state)
    assert layer.moe.router.get_parameter(number).tolist() == [0.5]
    assert state[f"moe.router.{number}"].dim() == 0
