"""The kit itself: wrong components are caught, with the promise and the smallest input named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import nn

import moezoo
from moezoo.capacity import CapacityPolicy, FirstCome
from moezoo.experts import StackedExperts
from moezoo.functional.queues import queue_positions
from moezoo.losses import RouterLoss
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers import SwitchRouter
from moezoo.testing import (
    InvariantBroken,
    check_experts,
    check_layer,
    check_loss,
    check_policy,
    check_router,
    routings,
    token_batches,
)


class PeeksAhead(SwitchRouter):
    def forward(self, tokens: Tokens) -> Routing:
        x = tokens.x + tokens.x.roll(-1, 0)
        return super().forward(Tokens(x, tokens.ids, tokens.real, tokens.group_size))


class ChangesInput(SwitchRouter):
    def forward(self, tokens: Tokens) -> Routing:
        tokens.x.mul_(1.5)
        return super().forward(tokens)


class NegativeWeights(SwitchRouter):
    def forward(self, tokens: Tokens) -> Routing:
        routing = super().forward(tokens)
        assert isinstance(routing.assignment, Assignment)
        return replace(
            routing, assignment=replace(routing.assignment, weight=-routing.assignment.weight)
        )


@pytest.mark.parametrize(
    ("router", "promise"),
    [(PeeksAhead, "causal"), (ChangesInput, "deterministic"), (NegativeWeights, "records")],
)
def test_a_wrong_router_is_caught(router: type[SwitchRouter], promise: str) -> None:
    with pytest.raises(InvariantBroken) as caught:
        check_router(router, examples=50)
    assert caught.value.invariant == promise
    assert "smallest input: Case(" in str(caught.value)
    assert router.__name__ in str(caught.value)


def test_the_message_says_what_how_with_which_input_and_what_to_do() -> None:
    with pytest.raises(InvariantBroken) as caught:
        check_router(PeeksAhead, examples=50)
    text = str(caught.value)
    assert text.startswith("PeeksAhead breaks 'causal': later tokens never change")
    assert re.search(r"how: +token \d+, with other tokens from \d+ on, (goes to|has other)", text)
    assert "tokens (groups x tokens per group)" in text
    assert "PeeksAhead promises this by `causal = True`" in text
    assert "declare `causal = False`" in text
    assert caught.value.case.tokens().num_tokens == caught.value.case.num_tokens


def test_a_router_declared_not_causal_is_held_to_its_other_promises() -> None:
    class Declared(PeeksAhead):
        causal = False
        batch_invariant = False

    with pytest.raises(InvariantBroken) as caught:
        check_router(Declared, examples=30)
    assert caught.value.invariant == "padding"  # it reads its neighbour, padding too
    assert "way out" not in str(caught.value)


def test_an_error_of_the_component_keeps_its_name() -> None:
    class Stumbles(SwitchRouter):
        def forward(self, tokens: Tokens) -> Routing:
            raise IndexError("the table is too short")

    with pytest.raises(InvariantBroken, match="IndexError: the table is too short"):
        check_router(Stumbles, examples=5)


def test_the_smallest_input_is_small() -> None:
    with pytest.raises(InvariantBroken) as caught:
        check_router(PeeksAhead, examples=100)
    assert caught.value.case.num_tokens <= 3


class OneTooMany(FirstCome):
    def forward(self, routing: Routing) -> Assignment:
        a = routing.assignment
        assert isinstance(a, Assignment)
        return replace(a, kept=a.kept & (queue_positions(a) <= self.limit(routing)))


class KeepsPadding(FirstCome):
    def forward(self, routing: Routing) -> Assignment:
        admitted = super().forward(routing)
        return replace(admitted, kept=torch.ones_like(admitted.kept))


class Wasteful(FirstCome):
    def forward(self, routing: Routing) -> Assignment:
        admitted = super().forward(routing)
        return replace(admitted, kept=admitted.kept & (admitted.token % 2 == 0))


@pytest.mark.parametrize("policy", [OneTooMany, KeepsPadding, Wasteful])
def test_a_wrong_policy_is_caught(policy: type[CapacityPolicy]) -> None:
    with pytest.raises(InvariantBroken):
        check_policy(policy, examples=50)


class ForgetsTheEnd(StackedExperts):
    def forward(self, slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return super().forward(slots, counts) + 1.0


def test_a_wrong_container_is_caught() -> None:
    with pytest.raises(InvariantBroken, match="rows of nobody"):
        check_experts(ForgetsTheEnd, examples=30)


class CountsPadding(RouterLoss):
    needs = frozenset({"logits"})

    def forward(self, routing: Routing) -> torch.Tensor:
        assert routing.logits is not None
        return routing.logits.logsumexp(-1).square().sum()


def test_a_wrong_loss_is_caught() -> None:
    with pytest.raises(InvariantBroken):
        check_loss(CountsPadding, examples=30)


def test_a_wrong_layer_is_caught() -> None:
    def forgets_the_gate(d_model: int, num_experts: int) -> moezoo.MoE:
        router = moezoo.routers.build("switch", d_model=d_model, num_experts=num_experts)
        experts = moezoo.experts.build("stacked", d_model=d_model, d_ff=8, num_experts=num_experts)
        layer = moezoo.MoE(router, experts, capacity=moezoo.capacity.build("dropless"))
        layer.register_forward_hook(lambda module, inputs, out: (out[0] * 2, out[1]))
        return layer

    with pytest.raises(InvariantBroken, match="plain loop"):
        check_layer(forgets_the_gate, examples=20)


@given(token_batches())
def test_token_batches_are_sound(tokens: Tokens) -> None:
    tokens.check()
    assert tokens.num_tokens <= 64


@given(routings())
def test_routings_are_sound(routing: Routing) -> None:
    assert isinstance(routing.assignment, Assignment)
    routing.assignment.check(routing.real)


def test_a_component_of_another_kind_is_refused_with_what_it_lacks() -> None:
    class NoForward:
        pass

    register: Callable[[type], type] = moezoo.routers.register("nothing")
    with pytest.raises(moezoo.MoezooError, match="has no method 'forward'"):
        register(NoForward)
    with pytest.raises(moezoo.MoezooError, match="Extend Router"):
        register(nn.Linear)
