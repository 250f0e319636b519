"""ReLU routing: continuous gates, the adaptive L1 loss."""

from __future__ import annotations

import pytest
import torch

from moezoo.errors import ConfigError
from moezoo.records import Tokens
from moezoo.routers.relu import ReLURouter
from tests.routers.batches import WIDTH, batch, make, pairs, sparse


def relu_router(**options: object) -> ReLURouter:
    router = make("relu", **options)
    assert isinstance(router, ReLURouter)
    return router


def test_a_pair_exists_exactly_where_the_gate_is_positive() -> None:
    tokens, router = batch(12, padded=True), relu_router()
    assert tokens.real is not None
    gate = tokens.x @ router.classifier.weight.T
    wanted = [(t, e) for t in range(12) for e in range(4) if tokens.real[t] and gate[t, e] > 0]
    routing = router(tokens)
    assert pairs(routing) == wanted
    values = torch.stack([gate[t, e] for t, e in wanted])
    assert torch.allclose(sparse(routing).weight, values, atol=1e-6)


def test_gates_are_continuous_where_an_expert_appears() -> None:
    router = relu_router()
    x = torch.randn(WIDTH)
    normal = router.classifier.weight[1].detach()
    x = x - normal * (x @ normal) / normal.square().sum()  # on the edge of expert 1
    gates = []
    for side in (-1e-4, 1e-4):
        a = sparse(router(Tokens((x + side * normal)[None])))
        gates.append(torch.zeros(4).index_add(0, a.expert, a.weight))
    assert torch.allclose(*gates, atol=1e-2)


def test_l1_loss_equals_a_loop() -> None:
    tokens, router = batch(10, padded=True), relu_router(k=2, coefficient=0.5)
    assert tokens.real is not None
    gate = (tokens.x @ router.classifier.weight.T).relu()[tokens.real].tolist()
    share = [sum(row[e] > 0 for row in gate) / len(gate) * 4 / 2 for e in range(4)]
    wanted = 0.5 * sum(row[e] * share[e] for row in gate for e in range(4)) / len(gate)
    assert router(tokens).losses["l1"].item() == pytest.approx(wanted, rel=1e-5)


def test_unbalanced_l1_loss_is_the_mean_sum_of_gates() -> None:
    tokens, router = batch(10), relu_router(balance=False, coefficient=1.0)
    wanted = (tokens.x @ router.classifier.weight.T).relu().sum(-1).mean()
    assert torch.allclose(router(tokens).losses["l1"], wanted)


def test_coefficient_rises_while_too_many_gates_are_open_and_falls_after() -> None:
    tokens, router = batch(50), relu_router(k=1, coefficient=1.0, alpha=2.0)
    router.adapt([router(tokens)])  # about half of the gates are open, a quarter is aimed at
    assert router.coefficient.item() == 2.0
    with torch.no_grad():
        router.classifier.weight.copy_(-router.classifier.weight.abs())
    closed = Tokens(tokens.x.abs())
    router.adapt([router(closed)])
    assert router.coefficient.item() == 1.0


def test_training_with_the_loss_reaches_the_target_sparsity() -> None:
    torch.manual_seed(0)
    tokens, router = batch(256), relu_router(k=1, coefficient=1e-3, bias=True)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(200):
        routing = router(tokens)
        task = (sparse(routing).weight.sum() / 256 - 2).square()
        optimizer.zero_grad()
        (task + routing.losses["l1"]).backward()
        optimizer.step()
        router.adapt([routing])
    active = sparse(router(tokens)).num_pairs / (256 * 4)
    assert abs(active - 0.25) < 0.08


def test_adapting_between_forward_and_backward_is_allowed() -> None:
    router = relu_router()
    routing = router(batch(8))
    router.adapt([routing])
    routing.losses["l1"].backward()
    assert router.classifier.weight.grad is not None


def test_padding_alone_leaves_the_coefficient() -> None:
    router = relu_router(coefficient=0.5)
    router.adapt([router(Tokens(torch.randn(3, WIDTH), real=torch.zeros(3, dtype=torch.bool)))])
    assert router.coefficient.item() == 0.5


def test_more_experts_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="k exceeds num_experts"):
        relu_router(k=5)
