"""The grouped product equals a plain loop in every backend, dtype and mode of torch."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.ops import backends, grouped_linear
from moezoo.ops.backends import BACKENDS, TABLE
from tests.imports import ROOT
from tests.ops.rows import cpu_backends, looped, row_counts

every_backend = pytest.mark.parametrize("backend", [*cpu_backends(), "auto"])
COUNTS = torch.tensor([2, 0, 3, 1])  # 6 of 8 rows; the second expert has none
REDUCED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def operands(
    dtype: torch.dtype = torch.float64, *, rows: int = 8, k: int = 16, m: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, k), (COUNTS.shape[0], m, k), (COUNTS.shape[0], m))
    )
    return x, weight, bias


@given(row_counts(), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_every_backend_equals_a_plain_loop(
    rows: tuple[Tensor, int], k: int, m: int, with_bias: bool, seed: int
) -> None:
    counts, num_rows = rows
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, k, generator=generator)
    weight = torch.randn(counts.shape[0], m, k, generator=generator)
    bias = torch.randn(counts.shape[0], m, generator=generator) if with_bias else None
    expected = looped(x, weight, counts, bias)
    for name, backend in BACKENDS.items():
        if backend.refusal(x, weight) is None:
            found = grouped_linear(x, weight, counts, bias=bias, backend=name)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        grouped_linear(x, weight, counts, bias=bias), expected, atol=1e-5, rtol=1e-5
    )


@every_backend
@pytest.mark.parametrize("dtype", REDUCED)
def test_values_and_gradients_hold_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    narrow = operands(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    found = grouped_linear(*narrow[:2], COUNTS, bias=narrow[2], backend=backend)
    expected = looped(*wide[:2], COUNTS, wide[2])
    assert found.dtype == dtype
    grad = torch.linspace(-1, 1, found.numel()).view_as(found)
    found.backward(grad.to(dtype))
    expected.backward(grad.double())
    tolerance = REDUCED[dtype] * 4
    pairs = [(found, expected)] + [(a.grad, b.grad) for a, b in zip(narrow, wide, strict=True)]
    for ours, reference in pairs:
        torch.testing.assert_close(ours.double(), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["loop", "padded", "auto"])
def test_it_differentiates_twice(backend: str) -> None:
    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return grouped_linear(x, weight, COUNTS, bias=bias, backend=backend)

    inputs = operands(k=3, m=2)
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


@every_backend
def test_an_expanded_gradient_is_a_gradient(backend: str) -> None:
    x, weight, _ = operands(torch.float32)
    grouped_linear(x, weight, COUNTS, backend=backend).sum().backward()
    expected = operands(torch.float32)
    looped(*expected[:2], COUNTS).sum().backward()
    torch.testing.assert_close(x.grad, expected[0].grad)
    torch.testing.assert_close(weight.grad, expected[1].grad)


@every_backend
def test_rows_and_experts_without_work_give_exact_zeros(backend: str) -> None:
    x, weight, _ = operands(torch.float32)
    for _ in range(3):  # memory that was used before shows what nobody wrote
        torch.full((8, 8), float("nan"))
        y = grouped_linear(x, weight, COUNTS, backend=backend)
        grad_x, grad_w = torch.autograd.grad(y.square().sum(), (x, weight))
        assert not y[6:].any()
        assert not grad_x[6:].any()
        assert not grad_w[1].any()
    nothing = grouped_linear(x[:0], weight, torch.zeros(4).long())
    assert nothing.shape == (0, 8)


@pytest.mark.parametrize("transposed", [False, True])
def test_any_layout_of_weights_and_rows_works(transposed: bool) -> None:
    x, weight, _ = (tensor.detach() for tensor in operands(torch.float32))
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    wide = torch.stack([x, x], dim=2)[..., 0]
    expected = looped(x, weight, COUNTS)
    for rows in (x, wide, x.t().contiguous().t()):
        for name in cpu_backends():
            found = grouped_linear(rows, weight, COUNTS, backend=name)
            torch.testing.assert_close(found, expected)


@every_backend
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(backend: str) -> None:
    x, weight, bias = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, weight, COUNTS, bias=bias, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), looped(x, weight, COUNTS, bias), atol=0.1, rtol=0.1)


class Layer(torch.nn.Module):
    def __init__(self, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = torch.nn.Parameter(operands(dtype)[1].detach())

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(x, self.weight, counts, backend=self.backend).relu()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_into_one_graph_with_its_gradient(backend: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = Layer(dtype, backend)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for counts in (COUNTS, COUNTS.flip(0)):
        inputs = [operands(dtype)[0].detach().requires_grad_() for _ in range(2)]
        outputs = [run(x, counts) for run, x in zip((layer, compiled), inputs, strict=True)]
        for y in outputs:
            y.sum().backward()
        assert torch.equal(*outputs)
        assert torch.equal(inputs[0].grad, inputs[1].grad)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_exports_as_one_operator_for_any_counts(backend: str, dtype: torch.dtype) -> None:
    layer, x = Layer(dtype, backend), operands(dtype)[0].detach()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (x, COUNTS), dynamic_shapes=({0: rows}, None))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called[0] == "moezoo.grouped_linear.default"
    assert not any("item" in name for name in called)
    longer = torch.cat([x, x])
    for rows_given, counts in ((x, COUNTS.flip(0)), (longer, COUNTS * 2)):
        assert torch.equal(program.module()(rows_given, counts), layer(rows_given, counts))


def test_the_operators_pass_the_checks_of_torch() -> None:
    x, weight, _ = operands(torch.float32)
    grad = torch.randn(8, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.moezoo.grouped_linear.default, (x, weight, COUNTS, "loop"))
    torch.library.opcheck(torch.ops.moezoo.grouped_outer.default, (grad, x, COUNTS, "loop"))


def test_a_backend_that_cannot_says_why() -> None:
    x, weight, _ = operands(torch.float64)
    with pytest.raises(ConfigError, match="grouped_mm knows no torch.float64"):
        grouped_linear(x, weight, COUNTS, backend="grouped")
    x, weight, _ = operands(torch.float32, k=3)
    with pytest.raises(ConfigError, match="multiples of 16 bytes"):
        grouped_linear(x, weight, COUNTS, backend="grouped")
    with pytest.raises(ConfigError, match="no rows|needs rows"):
        grouped_linear(operands(torch.float32)[0][:0], weight, COUNTS, backend="grouped")
    with pytest.raises(ConfigError, match="unknown backend 'loup'.*loop"):
        grouped_linear(x, weight, COUNTS, backend="loup")


def test_the_table_passes_over_a_backend_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TABLE", (backends.Choice("grouped"), *TABLE))
    taken = backends.choose("auto", *operands(torch.float32)[:2], COUNTS)
    assert taken is BACKENDS["grouped"]
    taken = backends.choose("auto", *operands(torch.float64)[:2], COUNTS)
    assert taken is BACKENDS["loop"]
    patched = (backends.Choice("padded", rows=3), *TABLE)
    monkeypatch.setattr(backends, "TABLE", patched)
    few, many = operands(rows=8)[:2], operands(rows=12)[:2]
    assert backends.choose("auto", *few, COUNTS) is BACKENDS["loop"]
    assert backends.choose("auto", *many, COUNTS) is BACKENDS["padded"]


@pytest.mark.parametrize(
    ("device", "dtype", "rows", "capability", "precision", "expected"),
    [
        ("cpu", torch.bfloat16, 1 << 20, 0, "highest", "loop"),
        ("cuda", torch.bfloat16, 1 << 20, 9, "highest", "grouped"),
        ("cuda", torch.bfloat16, 1 << 10, 9, "highest", "triton"),
        ("cuda", torch.bfloat16, 1 << 20, 8, "highest", "triton"),
        ("cuda", torch.bfloat16, 1 << 20, 12, "highest", "triton"),
        ("cuda", torch.float16, 1 << 20, 9, "highest", "triton"),
        ("cuda", torch.float32, 1 << 20, 9, "highest", "grouped"),
        ("cuda", torch.float32, 1 << 20, 9, "high", "triton"),
        ("cuda", torch.float64, 1 << 20, 9, "highest", "loop"),
    ],
)
def test_the_table_suits_the_device(
    device: str,
    dtype: torch.dtype,
    rows: int,
    capability: int,
    precision: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(rows, 8))
    monkeypatch.setattr(backends, "_major", lambda _: capability)
    monkeypatch.setattr(backends, "rounds_float32", lambda: precision == "high")
    fitting = [line.backend for line in TABLE if line.fits(x, rows // 8)]
    assert fitting[0] == expected


@pytest.mark.parametrize(
    ("setting", "rounds"),
    [
        ("pass", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.set_float32_matmul_precision('highest')", False),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("torch.backends.fp32_precision = 'tf32'", True),
    ],
)
def test_old_and_new_settings_of_rounding_are_understood(setting: str, rounds: bool) -> None:
    code = f"""
import torch
from moezoo.ops.rounding import rounds_float32
{setting}
assert rounds_float32() is {rounds}
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
