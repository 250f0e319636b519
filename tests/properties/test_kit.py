"""The kit itself: wrong components are caught, with the promise and the smallest input named."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

import moezoo
from moezoo.capacity import CapacityPolicy, FirstCome
from moezoo.experts import StackedExperts
from moezoo.functional.assign import pairs_of
from moezoo.functional.gates import gate_logits
from moezoo.functional.grouped_mlp import grouped_mlp
from moezoo.functional.queues import queue_positions
from moezoo.losses import RouterLoss, ZLoss
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers import Router, SwitchRouter
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
from moezoo.testing.experts import experts_promises
from moezoo.testing.layers import layer_promises
from moezoo.testing.losses import loss_promises
from moezoo.testing.policies import policy_promises
from moezoo.testing.routers import router_promises


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
    with pytest.raises(InvariantBroken, match="unused rows"):
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


class Scaled(torch.autograd.Function):
    """x, with a gradient that is -3 times the right one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -3.0 * gradient


def minus_three(x: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = Scaled.apply(x)
    return scaled


class WrongWeightGradient(SwitchRouter):
    """The gradient of the tokens is right, that of the classifier is not."""

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return gate_logits(x_TD, minus_three(self.classifier.weight))


class Detached(SwitchRouter):
    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().logits(x_TD).detach()


class ForgetsOneParameter(SwitchRouter):
    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.scale = nn.Parameter(torch.ones(()))

    def reset_own(self) -> None:
        nn.init.ones_(self.scale)

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().logits(x_TD) * self.scale.detach()


class HalfGate(SwitchRouter):
    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x_TD, self.classifier.weight.to(x_TD.dtype))


class OverflowsInHalf(SwitchRouter):
    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().logits((x_TD * 1e6) * 1e-6)


class HalfBuffer(SwitchRouter):
    """A bias that is cast with the model."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.register_buffer("level", torch.empty(num_experts))
        self.reset_own()

    def reset_own(self) -> None:
        self.level.fill_(0.1)

    def _apply(self, *arguments: Any, **named: Any) -> nn.Module:
        return nn.Module._apply(self, *arguments, **named)


class ChildBuffer(SwitchRouter):
    """The same in a child that is no component."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.register_buffer("level", torch.zeros(num_experts))

    def adapt(self, routings: Sequence[Routing]) -> None:
        parameter = next(self.parameters())
        self.level += torch.tensor(0.001, dtype=parameter.dtype)

    def reset_own(self) -> None:
        self.level.zero_()


class NoReset(SwitchRouter):
    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.scale = nn.Parameter(torch.ones(()))

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().logits(x_TD) * self.scale


class ForgetsInReset(NoReset):
    def reset_own(self) -> None:
        pass


class OtherWidth(SwitchRouter):
    """The constructor draws a child anew, which no method knows of."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        nn.init.normal_(self.classifier.weight, std=0.5)


class ForgetsInCopies(SwitchRouter):
    """State that no state dict holds."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.offset = torch.randn(num_experts)

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().logits(x_TD) + self.offset


@pytest.mark.parametrize(
    ("router", "promise", "words"),
    [
        (WrongWeightGradient, "gradcheck", "gradient of classifier.weight says .* difference"),
        (Detached, "gradient", "no gradient reaches classifier.weight"),
        (ForgetsOneParameter, "gradient", "no gradient reaches scale"),
        (HalfGate, "precision", "gates are torch.bfloat16"),
        (OverflowsInHalf, "dtypes", "not finite in torch.float16"),
        (HalfBuffer, "buffers", "level is torch.bfloat16 when cast: small steps would be lost"),
        (ChildBuffer, "balancing", "level after three steps of a bfloat16 model"),
        (NoReset, "reset", "nothing says how 'scale' starts"),
        (ForgetsInReset, "reset", "reset_parameters leaves scale as it was"),
        (OtherWidth, "reset", "classifier.weight has .* times the constructor's"),
        (ForgetsInCopies, "copies", "a copy does something else"),
    ],
)
def test_a_router_with_a_hidden_fault_is_caught(
    router: type[SwitchRouter], promise: str, words: str
) -> None:
    with pytest.raises(InvariantBroken, match=words):
        router_promises(router).verify_one(promise, 20)


class WrongExpertGradient(StackedExperts):
    def forward(self, slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return grouped_mlp(
            slots, counts, (self.wi,), minus_three(self.wo), function=self.function
        )  # fmt: skip


class NarrowExperts(StackedExperts):
    def forward(self, slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        wide = super().forward(slots, counts)
        return wide.float() if slots.dtype == torch.bfloat16 else wide


class OtherAlone(StackedExperts):
    def alone(self, row: torch.Tensor, expert: int) -> torch.Tensor:
        return 2.0 * super().alone(row, expert)


class UnsetExperts(StackedExperts):
    def reset_own(self) -> None:
        if not hasattr(self, "made"):  # the constructor's draw alone
            self.made = True
            super().reset_own()


@pytest.mark.parametrize(
    ("experts", "promise", "words"),
    [
        (WrongExpertGradient, "gradcheck", "gradient of wo says .* a difference quotient"),
        (NarrowExperts, "dtypes", "torch.bfloat16 came out as torch.float32"),
        (OtherAlone, "lone row", "a lone row of expert"),
        (UnsetExperts, "reset", "reset_parameters leaves wi as it was"),
    ],
)
def test_a_container_with_a_hidden_fault_is_caught(
    experts: type[StackedExperts], promise: str, words: str
) -> None:
    with pytest.raises(InvariantBroken, match=words):
        experts_promises(experts).verify_one(promise, 20)


class WrongPolicyGradient(FirstCome):
    def forward(self, routing: Routing) -> Assignment:
        a = super().forward(routing)
        return replace(a, weight=minus_three(a.weight))


class FloatWeights(FirstCome):
    def forward(self, routing: Routing) -> Assignment:
        a = super().forward(routing)
        weight = a.weight.float() if a.weight.dtype in (torch.float16, torch.bfloat16) else a.weight
        return replace(a, weight=weight)


@pytest.mark.parametrize(
    ("policy", "promise", "words"),
    [
        (WrongPolicyGradient, "gradient", "gradient of the scores says"),
        (FloatWeights, "dtypes", "torch.(bfloat16|float16) weights are torch.float32"),
    ],
)
def test_a_policy_with_a_hidden_fault_is_caught(
    policy: type[CapacityPolicy], promise: str, words: str
) -> None:
    with pytest.raises(InvariantBroken, match=words):
        policy_promises(policy).verify_one(promise, 20)


class WrongLossGradient(ZLoss):
    def forward(self, routing: Routing) -> torch.Tensor:
        return minus_three(super().forward(routing))


class NoLossGradient(ZLoss):
    def forward(self, routing: Routing) -> torch.Tensor:
        return super().forward(routing).detach()


class HalfLoss(ZLoss):
    def forward(self, routing: Routing) -> torch.Tensor:
        assert routing.logits is not None
        return super().forward(routing).to(routing.logits.dtype)


@pytest.mark.parametrize(
    ("loss", "promise", "words"),
    [
        (WrongLossGradient, "gradient", "gradient of logits says"),
        (NoLossGradient, "gradient", "no gradient reaches logits"),
        (HalfLoss, "dtypes", "the loss of torch.bfloat16 scores is torch.bfloat16"),
    ],
)
def test_a_loss_with_a_hidden_fault_is_caught(
    loss: type[RouterLoss], promise: str, words: str
) -> None:
    with pytest.raises(InvariantBroken, match=words):
        loss_promises(loss).verify_one(promise, 20)


class WrongLayerGradient(moezoo.MoE):
    def forward(self, x: torch.Tensor, **named: Any) -> tuple[torch.Tensor, Routing]:
        y, routing = super().forward(x, **named)
        return minus_three(y), routing


class OtherInference(moezoo.MoE):
    def forward(self, x: torch.Tensor, **named: Any) -> tuple[torch.Tensor, Routing]:
        y, routing = super().forward(x, **named)
        return y if torch.is_grad_enabled() else y.round(decimals=2), routing


class WideLayer(moezoo.MoE):
    def forward(self, x: torch.Tensor, **named: Any) -> tuple[torch.Tensor, Routing]:
        y, routing = super().forward(x, **named)
        return y.to(torch.promote_types(y.dtype, torch.float32)), routing


@pytest.mark.parametrize(
    ("kind", "promise", "words"),
    [
        (WrongLayerGradient, "gradient", "the gradient of .* says"),
        (OtherInference, "inference", "y without a gradient"),
        (WideLayer, "dtypes", "torch.bfloat16 came out as torch.float32"),
    ],
)
def test_a_layer_with_a_hidden_fault_is_caught(
    kind: type[moezoo.MoE], promise: str, words: str
) -> None:
    def make(d_model: int, num_experts: int) -> moezoo.MoE:
        router = moezoo.routers.build("switch", d_model=d_model, num_experts=num_experts)
        experts = moezoo.experts.build("stacked", d_model=d_model, d_ff=8, num_experts=num_experts)
        return kind(router, experts, capacity=moezoo.capacity.build("dropless"))

    with pytest.raises(InvariantBroken, match=words):
        layer_promises(make).verify_one(promise, 20)


class ThirdParty(Router):
    """A router of somebody else's: no class or child of the package but the base."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.d_model, self.num_experts = d_model, num_experts
        self.gate = nn.Linear(d_model, num_experts)
        self.register_buffer("level", torch.zeros(num_experts))

    def reset_own(self) -> None:
        self.level.zero_()

    def forward(self, tokens: Tokens) -> Routing:
        logits = gate_logits(tokens.x, self.gate.weight, self.gate.bias)
        probs = logits.softmax(-1)
        chosen = (probs + self.level.to(probs.dtype)).argmax(-1, keepdim=True)
        pairs = pairs_of(chosen, probs.gather(1, chosen), self.num_experts, tokens)
        return Routing(pairs, logits=logits, probs=probs, real=tokens.real)

    def adapt(self, routings: Sequence[Routing]) -> None:
        self.level += 0.001


def test_a_sound_router_of_another_package_passes() -> None:
    check_router(ThirdParty, examples=20)


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
