"""BASE layers: equal load at the greatest total score in training, greedy in evaluation."""

from __future__ import annotations

import torch

from tests.routers.batches import batch, make, pairs, sparse


def test_training_gives_every_expert_equally_many_tokens_of_each_group() -> None:
    tokens = batch(24, group_size=12)
    experts = sparse(make("base").train()(tokens)).expert.view(2, 12)
    assert [torch.bincount(row).tolist() for row in experts] == [[3] * 4] * 2


def test_padding_is_left_out_of_the_assignment() -> None:
    tokens = batch(20, padded=True)
    assert tokens.real is not None
    router = make("base").train()
    kept = pairs(router(tokens))
    alone = pairs(router(type(tokens)(tokens.x[tokens.real])))
    assert [e for _, e in kept] == [e for _, e in alone]


def test_evaluation_takes_the_best_expert() -> None:
    routing = make("base").eval()(batch(20))
    assert routing.logits is not None
    assert torch.equal(sparse(routing).expert, routing.logits.argmax(-1))


def test_weight_is_the_sigmoid_of_the_chosen_score_and_trains_the_gate() -> None:
    router = make("base").train()
    routing = router(batch(12))
    assert routing.logits is not None
    a = sparse(routing)
    assert torch.equal(a.weight, routing.logits[a.token, a.expert].sigmoid())
    a.weight.sum().backward()
    assert router.classifier.weight.grad.abs().sum() > 0
