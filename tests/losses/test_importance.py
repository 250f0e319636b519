"""Importance: the squared variation of the experts' summed weights."""

from __future__ import annotations

import pytest
import torch

from moezoo import losses, routers
from moezoo.pairing import loss_refusal
from tests.capacity.routings import of_probs, routing


def test_importance_equals_a_loop() -> None:
    record = routing(20, 3, 2, padded=True)
    a = record.assignment
    total = [0.0] * 3
    for token, expert, weight in zip(a.token, a.expert, a.weight, strict=True):
        total[expert] += float(weight) if record.real[token] else 0.0
    mean = sum(total) / 3
    wanted = sum((n - mean) ** 2 for n in total) / 3 / mean**2
    assert losses.build("importance")(record).item() == pytest.approx(wanted, rel=1e-5)


def test_equal_importance_costs_nothing_and_one_expert_for_all_costs_most() -> None:
    loss = losses.build("importance")
    assert loss(of_probs(torch.eye(4))).item() == 0.0
    assert loss(of_probs(torch.eye(4)[[2] * 8])).item() == pytest.approx(3.0)


def test_no_tokens_padding_alone_and_one_expert_cost_zero_with_zero_gradient() -> None:
    loss = losses.build("importance")
    for shape, real in (((0, 3), None), ((4, 3), torch.zeros(4, dtype=torch.bool)), ((4, 1), None)):
        probs = torch.full(shape, 0.5, requires_grad=True)
        value = loss(of_probs(probs, real=real))
        value.backward()
        assert value.item() == 0.0
        assert probs.grad.abs().sum() == 0.0


def test_routers_without_logits_are_refused() -> None:
    router = routers.build("hash", d_model=4, num_experts=2, vocab_size=8)
    reason = loss_refusal(router, losses.build("importance"), "importance")
    assert reason == "loss 'importance' needs logits, which HashRouter does not give"
