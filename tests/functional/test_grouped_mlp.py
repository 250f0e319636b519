"""The fused expert path equals a plain loop, in values, gradients and dropout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moezoo.experts import StackedExperts
from moezoo.functional import grouped_mlp as module
from moezoo.functional.activations import activation
from moezoo.functional.grouped_mlp import grouped_mlp
from tests.ops.rows import looped, row_counts

ACTIVATIONS = ("relu", "gelu", "silu", "squared-relu", "gated-gelu", "gated-relu")
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
COUNTS = torch.tensor([3, 0, 1, 5])


def operands(name: str, counts: Tensor, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    """x and the weights, in float64."""
    generator = torch.Generator().manual_seed(seed)
    experts, gated = counts.shape[0], activation(name)[1]
    shapes = [(rows, 3), *[(experts, 5, 3)] * (1 + gated), (experts, 3, 5)]
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(tensor.requires_grad_() for tensor in made)


def plain(name: str, counts: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
    hidden = activation(name)[0](looped(x, weights[0], counts))
    if len(weights) == 3:
        hidden = hidden * looped(x, weights[1], counts)
    return looped(hidden, weights[-1], counts)


def fused(name: str, counts: Tensor, x: Tensor, *weights: Tensor, p: float = 0.0) -> Tensor:
    return grouped_mlp(x, counts, weights[:-1], weights[-1], function=activation(name)[0], p=p)


@given(row_counts(), st.sampled_from(ACTIVATIONS), st.integers(0, 2**31))
def test_values_and_gradients_equal_a_plain_loop(
    rows: tuple[Tensor, int], name: str, seed: int
) -> None:
    counts, num_rows = rows
    inputs = operands(name, counts, num_rows, seed)
    expected = plain(name, counts, *inputs)
    if not expected.requires_grad:  # no expert has rows
        expected = expected + 0.0 * sum(tensor.sum() for tensor in inputs)
    found = fused(name, counts, *inputs)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(name, counts, *inputs), expected.detach())
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), wanted)


@every_activation
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_differentiates_twice_also_with_dropout(name: str, p: float) -> None:
    def compute(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return fused(name, COUNTS, *inputs, p=p)

    inputs = operands(name, COUNTS, 10)
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs, fast_mode=True)


@every_activation
def test_dropout_drops_hidden_units_with_the_asked_probability(name: str) -> None:
    counts, generator = torch.tensor([0, 4000]), torch.Generator().manual_seed(0)
    x = torch.rand(4000, 1, generator=generator) + 0.5
    inner = [torch.ones(2, 3, 1) for _ in range(1 + activation(name)[1])]
    outer = torch.zeros(2, 1, 3)
    outer[:, 0, 0] = 1.0  # the result is the first hidden unit
    torch.manual_seed(1)
    y = fused(name, counts, x, *inner, outer, p=0.25)
    whole = fused(name, counts, x, *inner, outer)
    dropped = (y == 0).float().mean()
    assert 0.22 < float(dropped) < 0.28
    torch.testing.assert_close(y[y != 0], whole[y != 0] / 0.75)


@every_activation
def test_compiled_and_autocast_paths_compute_the_same(name: str) -> None:
    torch._dynamo.reset()
    inputs = [tensor.detach().float().requires_grad_() for tensor in operands(name, COUNTS, 10)]

    def compute(*tensors: Tensor) -> Tensor:
        return fused(name, COUNTS, *tensors)

    eager = compute(*inputs)
    graph = torch.compile(compute, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(eager, graph)
    for ours, theirs in zip(gradients(eager, inputs), gradients(graph, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = compute(*inputs)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - eager).detach().norm() < 0.03 * eager.detach().norm()


def gradients(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), inputs)


def test_only_wanted_gradients_are_computed() -> None:
    x, inner, outer = (tensor.detach() for tensor in operands("relu", COUNTS, 10))
    for wanted in (x, inner, outer):
        wanted.requires_grad_()
        (grad,) = torch.autograd.grad(fused("relu", COUNTS, x, inner, outer).sum(), (wanted,))
        assert grad.shape == wanted.shape
        wanted.requires_grad_(False)


def test_relu_keeps_nothing_but_its_hidden_units_for_backward() -> None:
    x, inner, outer = operands("relu", COUNTS, 10)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        fused("relu", COUNTS, x, inner, outer, p=0.1)
    hidden = int(COUNTS.sum()) * inner.shape[1]
    assert sum(kept) == x.numel() + inner.numel() + outer.numel() + COUNTS.numel() + hidden


def test_one_row_reads_the_weights_of_one_expert_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = StackedExperts(4, 6, 3).eval()
    seen = []

    def spy(x: Tensor, weight: Tensor, *, relu: bool = False, training: bool = False) -> Tensor:
        seen.append(weight)
        y = x @ weight.t()
        return y.relu() if relu else y

    monkeypatch.setattr(module, "product", spy)
    with torch.no_grad():
        experts(torch.randn(1, 4), torch.tensor([0, 0, 1]))
    places = [experts.wi[2].data_ptr(), experts.wo[2].data_ptr()]
    assert [weight.data_ptr() for weight in seen] == places


def test_the_gradient_is_handed_over_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, made = StackedExperts(4, 6, 3), []

    def spy(shape: Sequence[int], like: Tensor, written: Sequence[int]) -> Tensor:
        gradient = like.new_zeros(shape)
        made.append(gradient.data_ptr())
        return gradient

    monkeypatch.setattr(module, "stacked_gradient", spy)
    experts(torch.randn(5, 4), torch.tensor([2, 0, 3])).sum().backward()
    assert {p.grad.data_ptr() for p in experts.parameters()} == set(made)
    assert all(not p.grad[1].any() and p.grad[2].any() for p in experts.parameters())
