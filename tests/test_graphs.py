"""A layer of every router is one graph under torch.compile and torch.export, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import moezoo
from moezoo import routers
from moezoo.ops import backends
from moezoo.ops.backends import Choice
from tests.ops.rows import cpu_backends

NAMES = [n for n in routers.names() if routers.registry.get(n).__module__.startswith("moezoo.")]

# What cannot be traced because a shape depends on the data, and the option that can.
DATA_DEPENDENT = {
    "base": "training solves an assignment whose rounds depend on the scores; evaluation traces",
    "relu": "tokens take as many experts as they have positive gates; max_choices=k traces",
    "expert_threshold": "tokens take as many experts as they reach; max_choices=k traces",
}
TRACEABLE = {"relu": {"max_choices": 2}, "expert_threshold": {"max_choices": 2}}


def layer(name: str, *, training: bool, **options: object) -> moezoo.SparseMLP:
    torch.manual_seed(0)
    made = moezoo.SparseMLP(8, 8, 4, router={"name": name, **options}, vocab_size=16)
    return made.train(training)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, 8, generator=generator)
    return x, torch.randint(16, (2, 6), generator=generator)


def step(module: torch.nn.Module, sparse: moezoo.SparseMLP, seed: int) -> list[Tensor]:
    """Output and gradients of one call."""
    x, ids = batch(seed)
    torch.manual_seed(1)  # routers that draw in training draw the same
    sparse.zero_grad()
    y = module(x.requires_grad_(), token_ids=ids)
    y.square().sum().backward()
    weights = [sparse.moe.experts.wi.grad, sparse.moe.experts.wo.grad]
    return [y, x.grad, *(w.clone() for w in weights if w is not None)]


@pytest.mark.parametrize(
    ("name", "training"),
    [(n, t) for n in NAMES for t in (True, False) if (n, t) != ("base", True)],
)
def test_every_router_compiles_with_its_layer_into_one_graph(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    sparse = layer(name, training=training, **TRACEABLE.get(name, {}))
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    for number, backend in enumerate(cpu_backends()):
        monkeypatch.setattr(backends, "TABLE", (Choice(backend),))
        results = zip(step(sparse, sparse, number), step(compiled, sparse, number), strict=True)
        for eager, graph in results:
            torch.testing.assert_close(eager, graph, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_router_exports_with_its_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = layer(name, training=False, **TRACEABLE.get(name, {}))
    x, ids = batch()
    program = torch.export.export(sparse, (x,), {"token_ids": ids}).module()
    for number, backend in enumerate(cpu_backends()):
        monkeypatch.setattr(backends, "TABLE", (Choice(backend),))
        x, ids = batch(number + 1)
        torch.testing.assert_close(program(x, token_ids=ids), sparse(x, token_ids=ids))


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_what_is_data_dependent_is_refused_by_tracing(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer(name, training=True), backend="aot_eager", fullgraph=True)
    x, ids = batch()
    with pytest.raises((UserError, GuardOnDataDependentSymNode), match="data-dependent"):
        compiled(x, token_ids=ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_exports_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    sparse = layer("switch", training=False).to(dtype)
    x = torch.randn(2, 6, 8, dtype=dtype)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(sparse, (x,), dynamic_shapes=({1: length},)).module()
    longer = torch.randn(2, 40, 8, dtype=dtype)
    torch.testing.assert_close(program(longer), sparse(longer), atol=2e-2, rtol=2e-2)
