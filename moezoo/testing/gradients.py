"""Gradients held to difference quotients, and half precision to float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moezoo.testing.invariants import Case

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
_STEP = 1e-6  # in float64: errors of 1e-12 by curvature, 1e-10 by rounding
# Of the norm: rounding of values, and of gradients, where an activation near 0 may flip.
_VALUES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
_GRADIENTS = {torch.float32: 2e-3, torch.float16: 0.3, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Outcome:
    """What a computation gave: values with a gradient, and decisions, at whose jumps there is
    none.
    """

    values: Sequence[Tensor]
    decisions: Sequence[Tensor] = ()

    def decides_as(self, other: Outcome) -> bool:
        """Whether all decisions are the same."""
        pairs = zip(self.decisions, other.decisions, strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


Side = tuple[Outcome, Mapping[str, Tensor]]  # and the leaves that it was computed from


def leaves_of(module: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """The parameters that want a gradient, and inputs, by name."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return named | {name: x.requires_grad_() for name, x in inputs.items()}


def gradients_of(
    outcome: Outcome, leaves: Mapping[str, Tensor], case: Case
) -> dict[str, Tensor | None]:
    """The gradient of a fixed random mix of the values with respect to every leaf."""
    total = _mixed(outcome.values, case)
    if not leaves or not total.requires_grad:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def check_gradients(run: Callable[[], Outcome], leaves: Mapping[str, Tensor], case: Case) -> None:
    """Assert that the gradient of every leaf (float64) is what a difference quotient along a random
    direction says; directions in which a decision jumps say nothing.
    """
    outcome = run()
    found = gradients_of(outcome, leaves, case)
    for number, (name, leaf) in enumerate(leaves.items()):
        along = case.noise(*leaf.shape, purpose=50 + number).to(leaf)
        quotient = _quotient(run, outcome, leaf, along, case)
        if quotient is None:
            continue
        gradient = found[name]
        said = 0.0 if gradient is None else float((gradient * along).sum())
        near = abs(said - quotient) <= 1e-5 * max(1.0, abs(quotient), abs(said))
        if not near and (gradient is None or not bool(gradient.any())):
            raise AssertionError(f"no gradient reaches {name}, though the result follows it")
        assert near, f"the gradient of {name} says {said:.6g}, a difference quotient {quotient:.6g}"


def check_reached(outcome: Outcome, leaves: Mapping[str, Tensor], case: Case) -> None:
    """Assert that a finite gradient, perhaps zero, reaches every leaf."""
    for name, gradient in gradients_of(outcome, leaves, case).items():
        assert gradient is not None, f"no gradient reaches {name}"
        assert bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite"


def check_narrow(
    narrow: Side,
    wide: Side,
    dtype: torch.dtype,
    case: Case,
) -> None:
    """Assert that values and gradients in `dtype` are those of float64 up to its rounding; where
    decisions differ, by a near tie, nothing can be compared.
    """
    outcome, expected = narrow[0], wide[0]
    for value in outcome.values:
        assert bool(torch.isfinite(value).all()), f"a result is not finite in {dtype}"
    if not outcome.decides_as(expected):
        return
    for value, reference in zip(outcome.values, expected.values, strict=True):
        _near(value, reference, _VALUES[dtype], f"results in {dtype}")
    found, right = gradients_of(outcome, narrow[1], case), gradients_of(expected, wide[1], case)
    for name, gradient in found.items():
        sought, leaf = right[name], narrow[1][name]
        if gradient is None or sought is None:
            none = gradient is None and sought is None
            assert none, f"{name} has a gradient in {dtype} or in float64, but not in both"
            continue
        assert gradient.dtype == leaf.dtype, f"the gradient of {name} is {gradient.dtype}"
        assert bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite"
        _near(gradient, sought, _GRADIENTS[dtype], f"the gradient of {name} in {dtype}")


def _near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}"
    gap = float((found.detach().double() - expected.detach()).norm())
    size = float(expected.detach().norm())
    fine = gap <= tolerance * max(size, 0.1)
    assert fine, f"{what} are off by {gap:.3g}, at a size of {size:.3g} in float64"


def _mixed(values: Sequence[Tensor], case: Case) -> Tensor:
    """The values times fixed random numbers, added up in float64."""
    total = torch.zeros((), dtype=torch.float64, device=case.device)
    for number, value in enumerate(values):
        wide = value.double()
        total = total + (wide * case.noise(*value.shape, purpose=20 + number).to(wide)).sum()
    return total


def _quotient(
    run: Callable[[], Outcome], here: Outcome, leaf: Tensor, along: Tensor, case: Case
) -> float | None:
    """The central difference of the mix along a direction; None where a decision jumps."""
    sides = []
    start = leaf.detach().clone()
    for sign in (1.0, -1.0):
        with torch.no_grad():
            leaf.copy_(start + sign * _STEP * along)
        outcome = run()
        if outcome.decides_as(here):
            sides.append(float(_mixed(outcome.values, case).detach()))
    with torch.no_grad():
        leaf.copy_(start)
    return (sides[0] - sides[1]) / (2.0 * _STEP) if len(sides) == 2 else None
