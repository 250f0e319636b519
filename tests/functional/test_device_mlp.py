"""The experts of a GPU, on a CPU: the same values and gradients as everywhere, on every backend."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moezoo.functional.activations import activation
from moezoo.functional.device_mlp import device_mlp, fits_device_mlp
from moezoo.ops import backends
from moezoo.ops.backends import BACKENDS, Choice
from tests.functional.test_grouped_mlp import COUNTS, every_activation, fused, operands
from tests.ops.rows import row_counts


def launched(name: str, counts: Tensor, x: Tensor, *weights: Tensor, p: float = 0.0) -> Tensor:
    function = activation(name)[0]
    return device_mlp(x, counts, weights, function=function, p=p)


@every_activation
@given(row_counts(), st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_the_cpu(
    name: str, rows: tuple[Tensor, int], seed: int
) -> None:
    counts, num_rows = rows
    inputs = operands(name, counts, num_rows, seed)
    found, expected = (make(name, counts, *inputs) for make in (launched, fused))
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["loop", "grouped", "padded"])
@every_activation
def test_rows_that_hold_anything_reach_no_result(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, gated = torch.tensor([3, 0, 2]), activation(name)[1]
    shapes = [(8, 4), *[(3, 8, 4)] * (1 + gated), (3, 4, 8)]
    torch.manual_seed(0)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    expected = fused(name, counts, *inputs)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    plain = BACKENDS[backend].linear

    def spoilt(x: Tensor, weight: Tensor, counts: Tensor, *, tail: bool = True) -> Tensor:
        out = plain(x, weight, counts, tail=True)
        if not tail:
            out[int(counts.sum()) :] = float("nan")
        return out

    monkeypatch.setattr(BACKENDS[backend], "linear", spoilt)
    monkeypatch.setattr(backends, "TABLE", (Choice(backend),))
    found = launched(name, counts, *inputs)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():  # which looks at every row
            torch.autograd.grad(launched(name, counts, *inputs).sum(), inputs)


@every_activation
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_differentiates_twice_also_with_dropout(name: str, p: float) -> None:
    def compute(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return launched(name, COUNTS, *inputs, p=p)

    inputs = operands(name, COUNTS, 10)
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs, fast_mode=True)


@every_activation
def test_under_autocast_weights_keep_their_dtype_and_their_gradients(name: str) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in operands(name, COUNTS, 10)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = launched(name, COUNTS, *inputs)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert [grad.dtype for grad in grads] == [torch.float32] * len(inputs)
    exact = torch.autograd.grad(fused(name, COUNTS, *inputs).sum(), inputs)
    for ours, theirs in zip(grads, exact, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_it_is_for_gpus_alone() -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(1, 4, 4)
    assert not fits_device_mlp(x, torch.tensor([2]), (weight, weight), 0.0)
