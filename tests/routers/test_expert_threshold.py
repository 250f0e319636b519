"""Expert threshold: expert choice made causal by a moving average."""

from __future__ import annotations

import pytest
import torch

from moezoo.errors import ConfigError
from moezoo.records import Tokens
from moezoo.routers.expert_threshold import ExpertThresholdRouter
from tests.routers.batches import batch, make, pairs, sparse


def threshold_router(**options: object) -> ExpertThresholdRouter:
    router = make("expert_threshold", **options)
    assert isinstance(router, ExpertThresholdRouter)
    return router


def test_experts_take_the_tokens_that_reach_their_threshold() -> None:
    tokens, router = batch(12, padded=True), threshold_router()
    router.threshold.copy_(torch.tensor([0.1, 0.2, 0.5, 0.9]))
    router.num_updates.fill_(1)
    assert tokens.real is not None
    probs = (tokens.x @ router.classifier.weight.T).softmax(-1)
    wanted = [
        (t, e)
        for t in range(12)
        for e in range(4)
        if tokens.real[t] and probs[t, e] >= router.threshold[e]
    ]
    assert pairs(router(tokens)) == wanted


def test_before_any_adaptation_tokens_take_their_best_experts() -> None:
    tokens = batch(12)
    for factor, k in ((0.5, 1), (2.0, 2)):
        early = sorted(pairs(threshold_router(factor=factor)(tokens)))
        assert early == sorted(pairs(make("top_k", k=k)(tokens)))


def test_first_adaptation_makes_it_equal_to_expert_choice_on_the_same_tokens() -> None:
    tokens, router = batch(64), threshold_router(factor=1.0)
    router.adapt([router(tokens)])
    choice = make("expert_choice", factor=1.0)
    assert sorted(pairs(router(tokens))) == sorted(pairs(choice(tokens)))


def test_later_adaptations_move_the_average() -> None:
    router = threshold_router(decay=0.9)
    one, two = router(batch(64)), router(batch(64, seed=1))
    router.adapt([one])
    first = router.threshold.clone()
    router.adapt([two])
    assert two.probs is not None
    second = two.probs.topk(16, dim=0).values[-1]
    assert torch.allclose(router.threshold, 0.9 * first + 0.1 * second)


def test_a_token_is_routed_alike_alone_and_in_company() -> None:
    tokens, router = batch(10), threshold_router()
    together = pairs(router(tokens))
    alone = [(t, e) for t in range(10) for _, e in pairs(router(Tokens(tokens.x[t : t + 1])))]
    assert together == alone


def test_forward_never_changes_the_thresholds() -> None:
    router = threshold_router().train()
    before = router.threshold.clone()
    router(batch(20))
    assert torch.equal(router.threshold, before)


def test_adapting_on_padding_alone_changes_nothing() -> None:
    router = threshold_router()
    before = router.threshold.clone()
    tokens = Tokens(torch.randn(4, 6), real=torch.zeros(4, dtype=torch.bool))
    router.adapt([router(tokens)])
    assert torch.equal(router.threshold, before)
    assert int(router.num_updates) == 0


def test_max_choices_keeps_the_highest_gates_in_a_fixed_shape() -> None:
    tokens = batch(30)
    free, bound = threshold_router(), threshold_router(max_choices=1)
    for router in (free, bound):
        router.threshold.fill_(0.05)
        router.num_updates.fill_(1)
    routing = free(tokens)
    assert routing.probs is not None
    best = routing.probs.argmax(-1).tolist()
    assert bound.choices == 1
    assert pairs(bound(tokens)) == list(enumerate(best))
    assert sparse(bound(tokens)).num_pairs == 30


def test_decay_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="decay lies in"):
        threshold_router(decay=1.0)
