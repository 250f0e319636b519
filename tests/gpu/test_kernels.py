"""The Triton kernels compiled for this GPU, and every backend of the grouped product."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moezoo.ops import grouped_linear
from moezoo.ops.backends import BACKENDS
from tests.imports import ROOT

COUNTS = [[700, 0, 300, 24], [0, 0, 0, 0], [1024, 0, 0, 0], [1] * 1000, [33] * 31]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def test_the_kernels_equal_the_loop() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/ops/kernels.py"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} experts")
@pytest.mark.parametrize(("k", "m"), [(64, 256), (200, 72)])
def test_every_backend_has_the_values_and_gradients_of_float64(
    backend: str, dtype: torch.dtype, counts: list[int], k: int, m: int
) -> None:
    torch.manual_seed(0)
    counts_E = torch.tensor(counts, device="cuda")
    shapes = (1024, k), (len(counts), m, k)
    x, weight = (torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in shapes)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    grad = torch.randn(1024, m, device="cuda", dtype=dtype)
    y = grouped_linear(x, weight, counts_E, backend=backend)
    expected = grouped_linear(*wide, counts_E, backend="loop")
    found = [y, *torch.autograd.grad(y, (x, weight), grad)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, wide, grad.double())]
    assert not y[sum(counts) :].any()
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        scale = float(reference.abs().max()) or 1.0
        torch.testing.assert_close(ours.detach().double() / scale, reference / scale,
                                   atol=TOLERANCE[dtype], rtol=0.0)  # fmt: skip
