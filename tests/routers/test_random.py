"""Random routing: uniform, seedable, repeatable in evaluation."""

from __future__ import annotations

import torch

from moezoo.records import Tokens
from tests.routers.batches import WIDTH, batch, make, pairs, sparse


def test_choices_are_uniform_in_training_and_evaluation() -> None:
    tokens = Tokens(torch.zeros(8000, WIDTH))
    for training in (True, False):
        router = make("random").train(training)
        share = torch.bincount(sparse(router(tokens)).expert, minlength=4) / 8000
        assert (share - 0.25).abs().max() < 0.02


def test_training_follows_torchs_seed() -> None:
    tokens, router = batch(40), make("random").train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(pairs(router(tokens)))
    assert draws[0] == draws[1] != draws[2]


def test_evaluation_repeats_itself_and_follows_its_own_seed() -> None:
    tokens = batch(40)
    first = pairs(make("random", seed=1).eval()(tokens))
    torch.manual_seed(99)
    assert pairs(make("random", seed=1).eval()(tokens)) == first
    assert pairs(make("random", seed=2).eval()(tokens)) != first


def test_k_experts_of_a_token_are_distinct_and_share_its_weight() -> None:
    routing = make("random", k=3).train()(batch(50))
    assert len(set(pairs(routing))) == 150
    assert torch.allclose(sparse(routing).weight, torch.tensor(1 / 3))
