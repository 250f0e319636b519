"""Invariants of expert containers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moezoo import experts as containers
from moezoo.experts.base import Experts
from moezoo.testing.gradients import (
    DTYPES,
    HALVES,
    Outcome,
    check_gradients,
    check_narrow,
    leaves_of,
)
from moezoo.testing.invariants import D_MODEL, Case, Invariant, Promises, close, same, seeded
from moezoo.testing.state import check_copies, state_invariants
from moezoo.testing.strategies import cases

D_FF = 8
Subject = str | dict[str, Any] | type[Experts] | Callable[[int, int, int], Experts]


def check_experts(
    subject: Subject,
    *,
    examples: int | None = None,
    device: str = "cpu",
) -> None:
    """Verify everything that an expert container promises, in evaluation mode.

    Args:
        subject: a registered name or spec, a class whose constructor takes d_model, d_ff and
            num_experts, or a function (d_model, d_ff, num_experts) -> Experts.
        examples: cases per invariant; None: hypothesis' current profile.
        device: where component and inputs live, as "cuda".

    Raises InvariantBroken naming the promise and the smallest input that breaks it.
    """
    experts_promises(subject, device=device).verify(examples)


def experts_promises(subject: Subject, *, device: str = "cpu") -> Promises:
    """What `check_experts` verifies."""
    checks = _Checks(subject)
    invariants: dict[str, tuple[str, Invariant]] = {
        **state_invariants(lambda case: checks.construct(case.num_experts)),
        "unused rows": ("rows past the counts come out as zero", checks.unused_rows),
        "alone": ("an expert's rows come out as if it were run alone", checks.alone),
        "unhit": ("an expert without rows gets a zero gradient, never None", checks.unhit),
        "input": ("slots and counts are never changed", checks.input_unchanged),
        "dtype": ("float64 goes in and out, and zero rows work", checks.dtype),
        "gradcheck": (
            "gradients of slots and of every parameter are right in float64",
            checks.gradcheck,
        ),
        "dtypes": ("half precision gives float64's rows and gradients, rounded", checks.dtypes),
        "lone row": ("one row without a gradient comes out as with one", checks.lone_row),
        "copies": ("a deep copy and a loaded state dict compute alike", checks.copies),
    }
    if checks.build(Case(device=device)).row_wise:
        invariants["rows"] = ("a row's output depends on that row alone", checks.rows)
    if checks.build(Case(device=device)).takes_weights:
        invariants["weights"] = ("weights multiply the rows, gradients too", checks.weights)
    once = frozenset({"reset", "buffers"})
    strategy = cases(max_group=10, max_experts=5, device=device)
    return Promises(checks.label, invariants, strategy, once, Case(device=device))


class _Checks:
    """The invariants of one subject; each takes a case and asserts."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.label = (
            subject if isinstance(subject, str) else getattr(subject, "__name__", str(subject))
        )

    def build(self, case: Case) -> Experts:
        with seeded(case.seed):
            made = self.construct(case.num_experts)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.normal_()
        return made.double().eval().to(case.device)

    def construct(self, num_experts: int) -> Experts:
        """The container as its constructor makes it."""
        if isinstance(self.subject, (str, dict)):
            sizes = {"d_model": D_MODEL, "d_ff": D_FF, "num_experts": num_experts}
            return containers.build(self.subject, **sizes)
        return self.subject(D_MODEL, D_FF, num_experts)

    def unused_rows(self, case: Case) -> None:
        slots, counts = inputs(case)
        used = int(counts.sum())
        slots[used:] = float("nan")
        tail = self.build(case)(slots, counts)[used:]
        same([tail], [torch.zeros_like(tail)], "rows past the counts")

    def alone(self, case: Case) -> None:
        experts, (slots, counts) = self.build(case), inputs(case)
        whole, start = experts(slots, counts), 0
        for expert, count in enumerate(counts.tolist()):
            only = torch.zeros_like(counts)
            only[expert] = count
            rows = slice(start, start + count)
            close(experts(slots[rows], only), whole[rows], f"expert {expert}", atol=1e-9)
            start += count

    def rows(self, case: Case) -> None:
        experts, (slots, counts) = self.build(case), inputs(case)
        used = int(counts.sum())
        if used < 2:
            return
        changed = slots.clone()
        changed[0] += 1.0
        found, expected = experts(changed, counts), experts(slots, counts)
        close(found[1:], expected[1:], "rows other than the changed one", atol=1e-9)

    def weights(self, case: Case) -> None:
        experts, (slots, counts) = self.build(case), inputs(case)
        source = case.generator(6)
        weights = torch.rand(len(slots), generator=source, dtype=torch.float64).to(case.device)
        weights.requires_grad_()
        found, expected = experts(slots, counts, weights), experts(slots, counts)
        close(found, expected * weights[:, None], "weighted rows", atol=1e-9)
        wants = [weights, *experts.parameters()]
        ours, theirs = (
            torch.autograd.grad(rows.square().sum(), wants, retain_graph=True)
            for rows in (found, expected * weights[:, None])
        )
        for one, other in zip(ours, theirs, strict=True):
            close(one, other, "their gradients", atol=1e-9)

    def unhit(self, case: Case) -> None:
        experts, (slots, counts) = self.build(case), inputs(case)
        experts(slots, counts).sum().backward()
        for name, parameter in experts.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            finite = bool(torch.isfinite(parameter.grad).all())
            assert finite, f"the gradient of {name} is not finite"
            if parameter.dim() == 3 and parameter.shape[0] == case.num_experts:
                idle = parameter.grad[counts == 0]
                assert bool((idle == 0).all()), f"{name} of an idle expert has a gradient"

    def input_unchanged(self, case: Case) -> None:
        slots, counts = inputs(case)
        before = slots.clone(), counts.clone()
        self.build(case)(slots, counts)
        same([slots, counts], before, "the container's input")

    def dtype(self, case: Case) -> None:
        experts = self.build(case)
        slots, counts = inputs(case)
        found = experts(slots, counts)
        assert found.dtype == torch.float64, f"float64 came out as {found.dtype}"
        assert found.shape == slots.shape, f"shape {tuple(found.shape)}"
        empty = experts(slots[:0], torch.zeros_like(counts))
        assert empty.shape == (0, D_MODEL), f"no rows came out as {tuple(empty.shape)}"

    def gradcheck(self, case: Case) -> None:
        experts, (slots, counts) = self.build(case), inputs(case)
        leaves = leaves_of(experts, slots=slots)
        check_gradients(lambda: Outcome([experts(slots, counts)]), leaves, case)

    def dtypes(self, case: Case) -> None:
        slots, counts = inputs(case)
        for dtype in DTYPES:
            narrow = self.build(case).to(dtype)
            sides = []
            for experts in (narrow, copy.deepcopy(narrow).double()):
                x = slots.to(dtype).to(next(iter(experts.parameters()), slots).dtype)
                leaves = leaves_of(experts, slots=x)
                sides.append((Outcome([experts(x, counts)]), leaves))
            (found,) = sides[0][0].values
            assert found.dtype == dtype, f"{dtype} came out as {found.dtype}"
            check_narrow(sides[0], sides[1], dtype, case)

    def lone_row(self, case: Case) -> None:
        slots, _ = inputs(case)
        for dtype in (torch.float64, *DTYPES):
            experts, row = self.build(case).to(dtype), slots[:1].to(dtype)
            for expert in range(case.num_experts if len(row) else 0):
                counts = torch.zeros(case.num_experts, dtype=torch.int64, device=case.device)
                counts[expert] = 1
                expected = experts(row, counts).detach()
                with torch.no_grad():
                    found, whole = experts.alone(row, expert), experts(row, counts)
                room = 1e-9 if dtype == torch.float64 else 0.1 if dtype in HALVES else 1e-4
                close(found, expected, f"a lone row of expert {expert} in {dtype}", atol=room)
                close(whole, expected, f"without a gradient, in {dtype}", atol=room)

    def copies(self, case: Case) -> None:
        slots, counts = inputs(case)
        check_copies(self.build, lambda experts: [experts(slots, counts)], case)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Slots (N, D) float64 and counts (E,) of a case; some rows may be unused."""
    total = case.num_tokens
    source = case.generator(5)
    slots = torch.randn(total, D_MODEL, generator=source, dtype=torch.float64)
    used = total if not case.padded else int(0.7 * total)
    chosen = torch.randint(case.num_experts, (used,), generator=source)
    counts = torch.zeros(case.num_experts, dtype=torch.int64)
    counts.index_add_(0, chosen, torch.ones_like(chosen))
    return slots.to(case.device), counts.to(case.device)
