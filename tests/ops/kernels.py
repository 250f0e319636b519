"""The Triton kernels, in Triton's interpreter on CPU tensors or as compiled for a GPU: run by
test_triton.py and tests/gpu in a process of its own, because TRITON_INTERPRET counts from the first
import of Triton on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.activations import activation
from moezoo.functional.dispatch import combine, dispatch
from moezoo.functional.fused_experts import fused_experts
from moezoo.functional.grouped_mlp import grouped_mlp
from moezoo.ops import grouped_linear
from moezoo.ops.backends import BACKENDS
from moezoo.ops.triton_clear import clear_experts, clear_rows
from moezoo.ops.triton_kernels import INTERPRETED, linear, outer, tiling
from moezoo.records import Assignment
from tests.ops.rows import row_counts

DEVICE = "cpu" if INTERPRETED else "cuda"
few = settings(max_examples=6 if INTERPRETED else 100)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ACTIVATIONS = ("relu", "silu", "gelu-tanh", "gated-relu", "gated-silu", "gated-gelu")
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of `dtype`, next to the largest value."""
    found, expected = found.detach().double(), expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype] * scale, rtol=0.0)


def test_it_is_the_interpreter_that_runs_where_there_is_no_gpu() -> None:
    assert INTERPRETED != torch.cuda.is_available()
    assert BACKENDS["triton"].refusal(random(2, 3, seed=0), random(1, 4, 3, seed=0)) is None
    reason = BACKENDS["triton"].refusal(random(2, 3, seed=0).double(), random(1, 4, 3, seed=0))
    assert reason == "the Triton kernels know no torch.float64"


@few
@given(row_counts(), st.integers(1, 40), st.integers(1, 40), st.sampled_from([*TOLERANCE]), seeds)
def test_the_products_equal_those_of_the_loop(
    rows: tuple[Tensor, int], k: int, m: int, dtype: torch.dtype, seed: int
) -> None:
    counts, num_rows = rows[0].to(DEVICE), rows[1]
    x = random(num_rows, k, seed=seed, dtype=dtype)
    weight = random(counts.shape[0], m, k, seed=seed + 1, dtype=dtype)
    y, loop = linear(x, weight, counts), BACKENDS["loop"]
    assert y.dtype == dtype
    assert_near(y, loop.linear(x.double(), weight.double(), counts), dtype)
    assert not y[int(counts.sum()) :].any()
    grad = outer(y, x, counts)
    assert grad.dtype == dtype
    assert_near(grad, loop.outer(y.double(), x.double(), counts), dtype)
    assert not grad[counts == 0].any()


@pytest.mark.parametrize(
    "counts",
    [[40, 0, 17, 3], [0, 0, 0, 0], [60, 0, 0, 0], [0, 0, 0, 60], [16, 16, 16, 12], [1] * 15],
)
def test_every_row_finds_its_expert_over_several_tiles(counts: list[int]) -> None:
    counts_E = torch.tensor(counts, device=DEVICE)
    x, weight = random(60, 20, seed=0), random(len(counts), 35, 20, seed=1)
    loop = BACKENDS["loop"]
    y = linear(x, weight, counts_E)
    torch.testing.assert_close(y, loop.linear(x, weight, counts_E))
    torch.testing.assert_close(outer(y, x, counts_E), loop.outer(y, x, counts_E))


@given(st.lists(st.integers(0, 70), min_size=1, max_size=40), st.integers(0, 50))
def test_the_grid_has_a_program_for_every_tile(counts: list[int], unused: int) -> None:
    tile = tiling(random(1, 1, seed=0))
    needed = sum(-(-count // tile.rows) for count in [*counts, unused])
    assert needed <= tile.programs(sum(counts) + unused, len(counts))


def test_transposed_weights_and_rows_need_no_copy() -> None:
    counts = torch.tensor([3, 0, 4], device=DEVICE)
    x, weight = random(8, 20, seed=0), random(3, 18, 20, seed=1)
    expected = linear(x, weight, counts)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(linear(x.t().contiguous().t(), turned, counts), expected)
    assert torch.equal(linear(x, weight[:1].expand(3, -1, -1), counts)[:3], expected[:3])
    grad = torch.ones((), device=DEVICE).expand(8, 18)
    assert torch.equal(outer(grad, x, counts), outer(grad.contiguous(), x, counts))


@given(row_counts(), st.integers(1, 40))
def test_unused_rows_and_experts_without_rows_are_cleared_and_nothing_else(
    rows: tuple[Tensor, int], width: int
) -> None:
    counts, num_rows = rows[0].to(DEVICE), rows[1]
    out = random(num_rows, width, seed=0) + 100.0
    expected = out.clone()
    expected[int(counts.sum()) :] = 0.0
    clear_rows(out, counts)
    assert torch.equal(out, expected)
    matrices = random(counts.shape[0], width, 9, seed=1) + 100.0
    wanted = matrices.masked_fill((counts == 0)[:, None, None], 0.0)
    clear_experts(matrices, counts)
    assert torch.equal(matrices, wanted)
    strided = torch.stack([counts, counts + 9], 1)[:, 0]
    out += 100.0
    expected = out.clone()
    expected[int(counts.sum()) :] = 0.0
    clear_rows(out, strided)
    assert torch.equal(out, expected)


def test_the_operator_has_the_gradients_of_the_loop() -> None:
    counts = torch.tensor([5, 0, 17, 2], device=DEVICE)
    leaves = [random(26, 9, seed=0), random(4, 7, 9, seed=1)]
    found: dict[str, list[Tensor]] = {}
    for backend in ("loop", "triton"):
        x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        y = grouped_linear(x, weight, counts, backend=backend)
        found[backend] = [y, *torch.autograd.grad(y.square().sum(), (x, weight))]
    for ours, expected in zip(found["triton"], found["loop"], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@st.composite
def assignments(draw: st.DrawFn) -> Assignment:
    """Pairs of tokens and experts, some dropped; 0 choices: any number of pairs per token."""
    tokens, experts = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    choices = draw(st.integers(0, min(2, experts)))
    generator = torch.Generator().manual_seed(draw(seeds))
    scores = torch.rand(tokens, experts, generator=generator)
    if choices:
        expert = scores.topk(choices, dim=1).indices.reshape(-1)
        token = torch.arange(tokens).repeat_interleave(choices)
    else:
        token, expert = (scores < 0.4).nonzero(as_tuple=True)
    order = torch.randperm(token.shape[0], generator=generator)
    weight = torch.rand(token.shape[0], generator=generator)
    kept = torch.rand(token.shape[0], generator=generator) < draw(st.sampled_from([0.0, 0.7, 1.1]))
    parts = [part.to(DEVICE) for part in (token[order], expert[order], weight, kept)]
    return Assignment(*parts, tokens, experts, tokens, choices).check()


def operands(
    assignment: Assignment, name: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """x, the gates and the weights: (T, 18), (N,), one or two (E, 21, 18), (E, 18, 21)."""
    experts, gated = assignment.num_experts, activation(name)[1]
    shapes = [(experts, 21, 18)] * (1 + gated) + [(experts, 18, 21)]
    weights = [random(*s, seed=i + 1, dtype=dtype) * 0.3 for i, s in enumerate(shapes)]
    x = random(assignment.num_tokens, 18, seed=0, dtype=dtype)
    return tuple(t.requires_grad_() for t in (x, assignment.weight.clone(), *weights))


def fused(assignment: Assignment, name: str, x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    function = activation(name)[0]
    given = replace(assignment, weight=gate)
    return fused_experts(x, given, weights[:-1], weights[-1], function=function)


def composed(
    assignment: Assignment, name: str, x: Tensor, gate: Tensor, *weights: Tensor
) -> Tensor:
    given = replace(assignment, weight=gate)
    slots, order = dispatch(x, given)
    function = activation(name)[0]
    y = grouped_mlp(slots.x, slots.counts, weights[:-1], weights[-1], function=function)
    return combine(y, given, order)


def gradients(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    grad = torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view_as(y)
    return torch.autograd.grad(y, inputs, grad)


def assert_fused_equals_composed(
    assignment: Assignment, name: str, inputs: tuple[Tensor, ...]
) -> None:
    expected, found = (make(assignment, name, *inputs) for make in (composed, fused))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pairs = zip(gradients(found, inputs), gradients(expected, inputs), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-5)


@few
@given(assignments(), st.sampled_from(["relu", "gated-silu"]))
def test_the_fused_experts_equal_dispatch_experts_and_combine(
    assignment: Assignment, name: str
) -> None:
    inputs = operands(assignment, name)
    assert_fused_equals_composed(assignment, name, inputs)
    with torch.no_grad():
        expected, found = (make(assignment, name, *inputs) for make in (composed, fused))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_and_layout_of_weights_is_the_one_of_the_layer(name: str) -> None:
    token = torch.arange(12, device=DEVICE)
    gate, kept = torch.linspace(0.2, 1.0, 12, device=DEVICE), token != 4
    assignment = Assignment(token, token % 2, gate, kept, 12, 3, 12, choices=1)
    x, gate, first, *others = operands(assignment, name)
    turned = first.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_fused_equals_composed(assignment, name, (x, gate, turned, *others))


@pytest.mark.parametrize(("name", "choices"), [("relu", 1), ("gated-gelu", 2)])
def test_the_fused_experts_hold_in_bfloat16_and_with_float32_weights(
    name: str, choices: int
) -> None:
    token = torch.arange(20, device=DEVICE).repeat_interleave(choices)
    expert = (token * 7 + torch.arange(token.shape[0], device=DEVICE)) % 3
    gate, kept = torch.linspace(0.2, 1.0, token.shape[0], device=DEVICE), token != 4
    assignment = Assignment(token, expert, gate, kept, 20, 3, 20, choices)
    narrow = operands(assignment, name, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in narrow]
    expected = composed(assignment, name, *wide)
    wanted = gradients(expected, wide)
    for weights in (narrow[2:], wide[2:]):
        inputs = (*narrow[:2], *weights)
        found = fused(assignment, name, *inputs)
        assert found.dtype == torch.bfloat16
        assert not found[4].any()
        assert_near(found, expected, torch.bfloat16)
        grads = gradients(found, inputs)
        assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in inputs]
        for ours, reference in zip(grads, wanted, strict=True):
            assert_near(ours, reference, torch.bfloat16)


def test_the_host_never_reads_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a read waits for the device, and a CUDA graph cannot hold it")

    token = torch.arange(20, device=DEVICE)
    ones = torch.ones(20, device=DEVICE)
    assignment = Assignment(token, token % 3, ones, token != 4, 20, 3, 20, choices=1)
    inputs = operands(assignment, "gated-silu")
    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "nonzero"):
        monkeypatch.setattr(Tensor, name, read)
    for choices in (1, 0):
        y = fused(replace(assignment, choices=choices), "gated-silu", *inputs)
        gradients(y, inputs)
    counts = torch.tensor([7, 0, 13], device=DEVICE)
    grouped_linear(inputs[0], inputs[2], counts, backend="triton").sum().backward()
    with pytest.raises(AssertionError, match="waits"):
        grouped_linear(inputs[0], inputs[2], counts, backend="loop")


def test_what_the_fused_experts_cannot_do_they_say() -> None:
    pair = torch.arange(2, device=DEVICE)
    assignment = Assignment(pair, pair * 0, pair + 1.0, pair >= 0, 2, 1, 2, choices=0)
    inputs = operands(assignment, "relu")
    with pytest.raises(ConfigError, match="know no torch.float64.*grouped_mlp"):
        fused(assignment, "relu", inputs[0].double(), *inputs[1:])
    with pytest.raises(ConfigError, match="know no .*gelu_tanh, relu, silu"):
        fused(assignment, "squared-relu", *inputs)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ConfigError, match="not deterministic"):
            fused(assignment, "relu", *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    y = fused(assignment, "relu", *inputs)
    (grad,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
