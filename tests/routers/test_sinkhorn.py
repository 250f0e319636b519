"""Sinkhorn routing: the plan's marginals; balanced in training, greedy in evaluation."""

from __future__ import annotations

import math

import torch

from moezoo.functional.sinkhorn import transport_plan
from moezoo.records import Tokens
from tests.routers.batches import batch, make, pairs, sparse


def test_plan_rows_sum_to_one_and_columns_to_equal_shares() -> None:
    score = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    real = torch.arange(24).view(2, 12) % 4 > 0
    plan = transport_plan(score, real, 200)
    assert torch.allclose(plan.sum(2), real.float(), atol=1e-5)
    assert torch.allclose(plan.sum(1), torch.full((2, 4), 9 / 4), atol=1e-4)


def test_plan_equals_alternating_normalisation_of_the_exponentials() -> None:
    score = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    plan = [[math.exp(s) for s in row] for row in score.tolist()]
    for _ in range(50):
        plan = [[p / sum(row) for p in row] for row in plan]
        column = [sum(row[e] for row in plan) for e in range(3)]
        plan = [[p * (7 / 3) / column[e] for e, p in enumerate(row)] for row in plan]
    plan = [[p / sum(row) for p in row] for row in plan]
    assert torch.allclose(transport_plan(score[None], None, 50)[0], torch.tensor(plan), atol=1e-4)


def test_training_balances_what_evaluation_sends_to_one_expert() -> None:
    tokens = batch(64)
    tokens = Tokens(torch.cat([tokens.x[:, :-1], torch.full((64, 1), 3.0)], dim=1))
    router = make("sinkhorn", temperature=0.1, iterations=64)
    with torch.no_grad():
        router.classifier.weight[2, -1] = 5.0
    greedy = torch.bincount(sparse(router.eval()(tokens)).expert, minlength=4)
    balanced = torch.bincount(sparse(router.train()(tokens)).expert, minlength=4)
    assert greedy.max() > 48
    assert balanced.max() < 24


def test_weights_are_plain_probabilities_whoever_is_chosen() -> None:
    tokens, router = batch(20), make("sinkhorn").train()
    routing = router(tokens)
    assert routing.probs is not None
    for (token, expert), weight in zip(pairs(routing), sparse(routing).weight, strict=True):
        assert weight == routing.probs[token, expert]


def test_sigmoid_gate_weighs_by_the_sigmoid_of_the_logit() -> None:
    routing = make("sinkhorn", gate="sigmoid").eval()(batch(10))
    assert routing.logits is not None
    assert torch.equal(sparse(routing).weight, routing.logits.amax(-1).sigmoid())


def test_scores_far_apart_still_give_a_finite_balanced_plan() -> None:
    score = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    score[..., 1] += 200.0
    plan = transport_plan(score, None, 300)
    assert torch.allclose(plan.sum(1), torch.full((1, 4), 3.0), atol=1e-3)
    score[0, 0], score[0, 1, 2] = 1e30, -1e30
    assert torch.isfinite(transport_plan(score, None, 20)).all()
