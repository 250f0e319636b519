"""The Triton kernels run in Triton's interpreter as the loop does, and compile for real GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moezoo.errors import ConfigError
from moezoo.ops import grouped_linear, triton_kernels, triton_mlp
from tests.imports import ROOT

STRIDES_OF_ONE = {"stride_xk", "stride_k", "stride_k2", "stride_am", "stride_bk"}
WHOLE_NUMBERS = {"counts_ptr": "*i64", "token_ptr": "*i64", "a_place_ptr": "*i64"}
WHOLE_NUMBERS |= {"b_place_ptr": "*i64"}
KERNELS = {
    "linear": (triton_kernels.linear_kernel, {}),
    "outer": (triton_kernels.outer_kernel, {"GATHER_A": True, "GATHER_B": False}),
    "hidden": (triton_mlp.hidden_kernel, {"FUNCTION": "relu", "GATED": False, "KEPT": False}),
    "gated": (triton_mlp.hidden_kernel, {"FUNCTION": "gelu_tanh", "GATED": True, "KEPT": True}),
    "stored": (triton_mlp.scatter_kernel, {"GATE": True, "ADDED": False}),
    "added": (triton_mlp.scatter_kernel, {"GATE": False, "ADDED": True}),
}


def run_interpreted(*arguments: str) -> None:
    """Run these tests with the kernels in the interpreter; pytest fails if it finds none."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # those of the process that runs this test
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_equal_the_loop_in_the_interpreter() -> None:
    run_interpreted("tests/ops/kernels.py")


def test_the_backend_passes_the_tests_of_every_backend() -> None:
    run_interpreted("tests/ops/test_grouped_linear.py", "-k", "triton")


def compiled(name: str, dtype: str, capability: int, shared: int) -> Any:
    """A kernel as it is compiled for contiguous operands of widths that 16 divides, and for a card
    with so much shared memory per block.
    """
    kernel, flags = KERNELS[name]
    tile = triton_kernels.fitting_tiling(shared, 2 if dtype == "*bf16" else 4)
    tile = triton_mlp.for_two_products(tile) if name == "gated" else tile
    values = {**triton_kernels.constants(tile, 128), **flags}
    options = {n: values.pop(n) for n in ("enable_fp_fusion", "num_warps", "num_stages")}
    values |= {name: 1 for name in kernel.arg_names if name in STRIDES_OF_ONE}
    kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(values, "constexpr")
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
    kinds |= {n: WHOLE_NUMBERS.get(n, dtype) for n in pointers}
    if flags.get("ADDED") or "gate_ptr" in pointers:
        kinds["gate_ptr"] = "*fp32"
    if flags.get("ADDED"):
        kinds["out_ptr"] = "*fp32"
    place = {n: i for i, n in enumerate(kernel.arg_names)}
    aligned = {(place[n],): [["tt.divisibility", 16]] for n in place if n not in values}
    source = ASTSource(kernel, kinds, {(place[n],): v for n, v in values.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "capability", "shared"),
    [("*bf16", 90, 227 * 1024), ("*bf16", 86, 99 * 1024), ("*fp32", 80, 163 * 1024)],
)
def test_every_kernel_compiles_for_a_gpu(
    name: str,
    dtype: str,
    capability: int,
    shared: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled(name, dtype, capability, shared)
    assert made.asm["cubin"]
    assert made.metadata.shared <= shared
    if capability == 90:
        assert "wgmma" in made.asm["ptx"]  # the products run on tensor cores


def test_a_cpu_tensor_is_refused_without_the_interpreter() -> None:
    x, weight, counts = torch.zeros(2, 3), torch.zeros(1, 4, 3), torch.tensor([2])
    with pytest.raises(ConfigError, match="run on a GPU, not on cpu.*backend='auto'"):
        grouped_linear(x, weight, counts, backend="triton")


def test_without_triton_the_backend_says_so_and_nothing_else_is_lost() -> None:
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from moezoo import SparseMLP
from moezoo.ops.backends import BACKENDS
x = torch.zeros(2, 3)
assert BACKENDS["triton"].refusal(x, torch.zeros(1, 4, 3)) == "triton is not installed"
assert SparseMLP(8, 16, 4)(torch.randn(2, 3, 8)).shape == (2, 3, 8)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_and_running_a_layer_does_not_import_triton() -> None:
    code = """
import sys, torch
from moezoo import SparseMLP
SparseMLP(8, 16, 4)(torch.randn(2, 3, 8)).sum().backward()
print("moezoo.ops.triton_kernels" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
