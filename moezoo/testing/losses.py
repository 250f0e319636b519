"""Invariants of router losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moezoo import losses
from moezoo.losses.base import RouterLoss
from moezoo.records import Routing
from moezoo.testing.invariants import Case, Invariant, Promises, close
from moezoo.testing.strategies import cases, routing_of, without

Subject = str | dict[str, Any] | type[RouterLoss] | Callable[[], RouterLoss]


def check_loss(
    subject: Subject,
    *,
    examples: int | None = None,
    device: str = "cpu",
) -> None:
    """Verify what every router loss promises, on token-choice routings.

    Losses that a router computes itself (`needs` "losses.NAME") are read from the routing; here
    only their plumbing is checked.

    Args:
        subject: a registered name or spec, a loss class, or a function without arguments.
        examples: cases per invariant; None: hypothesis' current profile.
        device: where the routings live, as "cuda".

    Raises InvariantBroken naming the promise and the smallest input that breaks it.
    """
    loss_promises(subject, device=device).verify(examples)


def loss_promises(subject: Subject, *, device: str = "cpu") -> Promises:
    """What `check_loss` verifies."""
    checks = _Checks(subject)
    invariants: dict[str, tuple[str, Invariant]] = {
        "scalar": ("one finite number, in any mode", checks.scalar),
        "nothing": ("no real token gives 0, never NaN", checks.nothing),
    }
    if not any(need.startswith("losses.") for need in checks.build().needs):
        invariants["padding"] = ("padding does not count", checks.padding)
        invariants["gradient"] = ("the gradient is finite and not None", checks.gradient)
    return Promises(checks.label, invariants, cases(max_group=8, device=device))


class _Checks:
    """The invariants of one subject; each takes a case and asserts."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.label = (
            subject if isinstance(subject, str) else getattr(subject, "__name__", str(subject))
        )

    def build(self) -> RouterLoss:
        subject = self.subject
        return losses.build(subject) if isinstance(subject, (str, dict)) else subject()

    def routing(self, case: Case) -> Routing:
        plain = routing_of(case, 1)
        names = [need for need in self.build().needs if need.startswith("losses.")]
        zero = torch.zeros((), device=case.device)
        own = {name.removeprefix("losses."): zero for name in names}
        return Routing(
            plain.assignment, logits=plain.logits, probs=plain.probs, losses=own, real=plain.real
        )

    def scalar(self, case: Case) -> None:
        value = self.build().train(case.training)(self.routing(case))
        assert value.dim() == 0, f"shape {tuple(value.shape)}"
        assert bool(torch.isfinite(value)), f"the loss is {float(value)}"

    def nothing(self, case: Case) -> None:
        routing = self.routing(case)
        nobody = torch.zeros(case.num_tokens, dtype=torch.bool, device=case.device)
        a = routing.assignment
        empty = a.__class__(**{**a.__dict__, "kept": torch.zeros_like(a.kept)})  # type: ignore[union-attr]
        value = self.build()(
            Routing(
                empty,
                logits=routing.logits,
                probs=routing.probs,
                losses=routing.losses,
                real=nobody,
            )
        )
        assert float(value) == 0.0, f"{float(value)} without a real token"

    def padding(self, case: Case) -> None:
        if not case.padded or case.groups != 1 or case.num_tokens == 0:
            return
        routing = self.routing(case)
        assert routing.real is not None
        count = int(routing.real.sum())
        if not count:
            return
        alone = without(routing, routing.real, count)
        value = self.build()(alone)
        close(self.build()(routing), value, "with padding instead of without it")

    def gradient(self, case: Case) -> None:
        routing = self.routing(case)
        assert routing.logits is not None
        leaf: Tensor = routing.logits.clone().requires_grad_()
        probs = leaf.softmax(-1)
        value = self.build()(
            Routing(routing.assignment, logits=leaf, probs=probs, real=routing.real)
        )
        if case.num_tokens == 0 or not value.requires_grad:
            return
        value.backward()
        assert leaf.grad is not None, "no gradient reaches the logits"
        assert bool(torch.isfinite(leaf.grad).all()), "the gradient is not finite"
