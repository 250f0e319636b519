"""Invariants of router losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moezoo import losses
from moezoo.losses.base import RouterLoss
from moezoo.records import Assignment, Routing
from moezoo.testing.gradients import DTYPES, Outcome, check_gradients, check_narrow
from moezoo.testing.invariants import Case, Invariant, Promises, close
from moezoo.testing.state import check_copies, state_invariants
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
    invariants |= {
        "gradient": ("the gradient of scores and weights is right in float64", checks.gradient),
        "dtypes": ("half precision gives float64's loss and gradient, rounded", checks.dtypes),
        "copies": ("a deep copy and a loaded state dict give the same loss", checks.copies),
        **state_invariants(lambda case: checks.build()),
    }
    strategy = cases(max_group=8, device=device)
    once = frozenset({"reset", "buffers"})
    return Promises(checks.label, invariants, strategy, once, Case(device=device))


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
        leaves = self.leaves(case, torch.float64)
        loss = self.build().train(case.training)
        check_gradients(lambda: Outcome([loss(self.of_leaves(case, leaves))]), leaves, case)
        if self.reads_scores(loss) and case.num_tokens:
            value = loss(self.of_leaves(case, leaves))
            assert value.requires_grad, "no gradient reaches the routing"

    def dtypes(self, case: Case) -> None:
        loss = self.build().train(case.training)
        for dtype in DTYPES:
            narrow = self.leaves(case, dtype)
            wide = {name: leaf.detach().double().requires_grad_() for name, leaf in narrow.items()}
            sides = [(Outcome([loss(self.of_leaves(case, x))]), x) for x in (narrow, wide)]
            (value,) = sides[0][0].values
            assert value.dtype == torch.float32, f"the loss of {dtype} scores is {value.dtype}"
            check_narrow(sides[0], sides[1], dtype, case)

    def copies(self, case: Case) -> None:
        routing = self.routing(case)
        check_copies(lambda _: self.build(), lambda loss: [loss(routing)], case)

    def reads_scores(self, loss: RouterLoss) -> bool:
        """Whether a loss is computed here, from what routers give everybody."""
        return not any(need.startswith("losses.") for need in loss.needs)

    def leaves(self, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a loss may differentiate: scores (T, E), and what the router computed itself."""
        scores = case.noise(case.num_tokens, case.num_experts, purpose=2).to(dtype)
        leaves = {"logits": scores.requires_grad_()}
        for number, need in enumerate(sorted(self.build().needs)):
            if need.startswith("losses."):
                own = case.noise(purpose=60 + number).abs()
                leaves[need] = own.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        return leaves

    def of_leaves(self, case: Case, leaves: Mapping[str, Tensor]) -> Routing:
        """The routing of a case whose probabilities and weights follow from the leaves."""
        plain = self.routing(case)
        a = plain.assignment
        assert isinstance(a, Assignment)
        probs = leaves["logits"].softmax(-1)
        weight = probs[a.token, a.expert]
        own = {n.removeprefix("losses."): leaf for n, leaf in leaves.items() if n != "logits"}
        return replace(
            plain,
            assignment=replace(a, weight=weight),
            logits=leaves["logits"],
            probs=probs,
            losses=own,
        )
