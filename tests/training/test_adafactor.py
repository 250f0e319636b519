"""Adafactor equals torch's but for the cap on the rate; T5's schedule is 1 / sqrt(max(step, k))."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from moezoo.training.adafactor import Adafactor
from moezoo.training.recipes import RECIPES, make_optimizer, make_schedule, rate_factor

SHAPES = [(5, 7), (3, 5, 7), (6,), (), (1, 4)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_below_the_cap_of_torch_both_are_equal(dtype: torch.dtype, weight_decay: float) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = Adafactor(ours, 1e-2, weight_decay=weight_decay)
    other = torch.optim.Adafactor(theirs, lr=1e-2, weight_decay=weight_decay, foreach=False)
    for step in range(8):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * 10.0 ** (step % 4 - 2)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
        found, wanted = mine.state[a], other.state[b]
        assert found.keys() == wanted.keys()  # one's checkpoint is the other's
        assert all(found[name].shape == wanted[name].shape for name in found)


def test_the_rate_is_what_it_is_told_at_any_step() -> None:
    for rate in (0.5, 0.01):
        (weight,) = parameters()[:1]
        optimizer = Adafactor([weight], rate)
        weight.grad = torch.sign(torch.randn_like(weight))
        before = weight.detach().clone()
        for _ in range(200):
            weight.data.copy_(before)
            optimizer.step()
        moved = float((weight.detach() - before).norm() / before.norm())
        assert moved == pytest.approx(rate, rel=1e-3)  # torch moves by 0.07 at most


def test_a_state_is_continued_from_its_dictionary() -> None:
    one, two = parameters(), parameters()
    first, second = Adafactor(one, 0.1), Adafactor(two, 0.1)
    for step in range(4):
        if step == 2:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            for a, b in zip(one, two, strict=True):
                b.data.copy_(a.data)
        for a, b in zip(one, two, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        first.step()
        if step >= 2:
            second.step()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("step", [1, 2, 9_999, 10_000, 10_001, 40_000, 1_000_000])
def test_pre_training_has_the_rates_of_t5(step: int) -> None:
    settings = RECIPES["pretrain"]
    rate = settings.learning_rate * rate_factor(settings, 2_000_000)(step - 1)
    assert rate == pytest.approx(1 / math.sqrt(max(step, 10_000)))


def test_the_first_step_of_pre_training_has_the_peak() -> None:
    model, settings = nn.Linear(4, 4), RECIPES["pretrain"]
    optimizer = make_optimizer(model, settings)
    assert isinstance(optimizer, Adafactor)
    assert make_schedule(optimizer, settings, 10).get_last_lr() == [0.01]
