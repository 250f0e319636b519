"""Invariants of state: initial values, the precision of buffers, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.component import Component
from moezoo.testing.gradients import HALVES
from moezoo.testing.invariants import Case, Invariant, same, seeded

_SEEDS = 24
_GARBAGE = 91

RESET = (
    "built on meta, given memory and reset, it starts as its constructor makes it; else give it a "
    "method reset_own that sets its own parameters and buffers"
)
BUFFERS = (
    "buffers stay float32 or integer in half precision, however it is built, loaded or cast; else "
    "let the module that owns them extend Component"
)


def state_invariants(make: Callable[[Case], nn.Module]) -> dict[str, tuple[str, Invariant]]:
    """What holds for the state of every component; `make` calls the constructor and no more."""

    def reset(case: Case) -> None:
        check_reset(lambda: make(case), case.seed)

    def buffers(case: Case) -> None:
        check_buffers(lambda: make(case))

    return {"reset": (RESET, reset), "buffers": (BUFFERS, buffers)}


def check_reset(make: Callable[[], nn.Module], seed: int) -> None:
    """Assert that `reset_parameters` after "meta" gives what the constructor gives: the same bits
    for the same seed, or at least the same constants and spread.
    """
    with seeded(seed):
        direct = make().state_dict()
    late = _reset(make, seed).state_dict()
    assert late.keys() == direct.keys(), "other tensors on meta than on a device"
    differs = [name for name, tensor in late.items() if not torch.equal(tensor, direct[name])]
    if not differs:
        return
    drawn, again = [], []
    for other in range(seed + 1, seed + 1 + _SEEDS):
        with seeded(other):
            drawn.append(make().state_dict())
        again.append(_reset(make, other).state_dict())
    for name in differs:
        _check_spread(name, [s[name] for s in drawn], [s[name] for s in again])


def _reset(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.device("meta"):
        late: Any = make()
    for name, tensor in late.state_dict().items():
        assert tensor.is_meta, f"{name} is built on {tensor.device} under torch.device('meta')"
    late.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in late.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else _GARBAGE)
    if not callable(getattr(late, "reset_parameters", None)):
        assert not late.state_dict(), "it has tensors and no method reset_parameters"
        return late  # type: ignore[no-any-return]
    with seeded(seed):
        late.reset_parameters()
    for name, tensor in late.state_dict().items():
        left = tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        assert not left, f"reset_parameters leaves {name} as it was"
    return late  # type: ignore[no-any-return]


def _check_spread(name: str, drawn: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    if not drawn[0].is_floating_point() or all(torch.equal(drawn[0], t) for t in drawn):
        same([again[0]], [drawn[0]], f"{name} after reset_parameters")
        return
    one, other = torch.stack(list(drawn)).double(), torch.stack(list(again)).double()
    ratio = float(other.std() / one.std().clamp(min=1e-300))
    room = 1.15 if one.numel() > 1000 else 1.4
    assert 1.0 / room < ratio < room, (
        f"{name} has {ratio:.3g} times the constructor's standard deviation after reset_parameters"
    )


def check_buffers(make: Callable[[], nn.Module]) -> None:
    """Assert that no buffer is ever half precision, nor rounded on the way where no half-precision
    number was given.
    """
    with seeded(0):
        plain = make()
    exact = dict(_own_buffers(plain))
    if not exact:
        return
    for dtype in HALVES:
        for road, exactly, module in _roads(make, plain, dtype):
            for name, buffer in _own_buffers(module):
                half = buffer.is_floating_point() and buffer.element_size() < 4
                assert not half, f"{name} is {buffer.dtype} {road}: small steps would be lost"
                if exactly:
                    same([buffer.double()], [exact[name].double()], f"{name} {road}")


def _roads(
    make: Callable[[], nn.Module], plain: nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, bool, nn.Module]]:
    """Half-precision modules: how each was made, whether its buffers keep every bit, and it."""
    halves = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.state_dict().items()}
    with seeded(0), _default_dtype(dtype):
        yield "when built with that default dtype", True, make()
    yield "when cast", True, copy.deepcopy(plain).to(dtype)
    assigned = copy.deepcopy(plain)
    assigned.load_state_dict(halves, assign=True)
    yield "when a state dict is assigned", False, assigned
    with torch.device("meta"):
        late: Any = make()
    late.to(dtype).load_state_dict(halves, assign=True)
    yield "when cast on meta and assigned", False, late
    yield "in a deep copy", False, copy.deepcopy(assigned)


def _own_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers of a component and of what it consists of; not those of foreign experts in it."""
    for prefix, part in module.named_modules():
        if isinstance(part, Component) or part is module:
            yield from part.named_buffers(prefix, recurse=False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_copies(
    build: Callable[[Case], nn.Module], run: Callable[[Any], Sequence[Tensor]], case: Case
) -> None:
    """Assert that a deep copy, and another one that the state is loaded into or assigned to, do
    what the original does.
    """
    original = build(case).eval()
    expected = run(original)
    loaded, assigned = (build(replace(case, seed=case.seed + 1)).eval() for _ in range(2))
    loaded.load_state_dict(original.state_dict(), strict=True)
    assigned.load_state_dict(copy.deepcopy(original.state_dict()), strict=True, assign=True)
    for twin in (copy.deepcopy(original), loaded, assigned):
        same(run(twin), expected, "a copy does something else")
