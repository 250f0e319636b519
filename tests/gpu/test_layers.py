"""Sparse layers on a GPU: the values of a CPU, no wait of the host, graphs, reduced precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.records import Routing

D_MODEL, D_FF, EXPERTS = 64, 128, 8
BOUNDED = {"relu": {"max_choices": 2}, "expert_threshold": {"max_choices": 2}}


def layer(router: str | dict[str, object], **options: object) -> moezoo.SparseMLP:
    torch.manual_seed(0)
    made = moezoo.SparseMLP(D_MODEL, D_FF, EXPERTS, router=router, vocab_size=50, **options)
    return made.cuda()


@contextmanager
def host_never_waits() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError in here."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, 96, D_MODEL, device="cuda", dtype=dtype)
    return x, torch.randint(50, (4, 96), device="cuda")


@pytest.mark.parametrize("name", moezoo.routers.names())
def test_values_and_gradients_are_those_of_the_cpu(name: str) -> None:
    ours = layer(name).eval()
    twin = layer(name).eval().cpu().double()
    ours = ours.double()
    x, ids = batch(torch.float64)
    y = ours(x.requires_grad_(), token_ids=ids)
    there = x.detach().cpu().requires_grad_()
    expected = twin(there, token_ids=ids.cpu())
    torch.testing.assert_close(y.cpu(), expected, atol=1e-9, rtol=1e-7)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad.cpu(), there.grad, atol=1e-8, rtol=1e-7)
    for (key, mine), theirs in zip(ours.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, key
        else:
            torch.testing.assert_close(mine.grad.cpu(), theirs.grad, atol=1e-8, rtol=1e-7)


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def free_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Those whose products no backend waits for; float32 where products may be rounded."""
    torch.set_float32_matmul_precision("high")
    yield getattr(torch, request.param)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", moezoo.routers.names())
@pytest.mark.parametrize("capacity", [None, "dropless"])
def test_the_host_never_waits(name: str, capacity: str | None, free_dtype: torch.dtype) -> None:
    if moezoo.routers.registry.get(name).soft or name == "expert_choice":
        capacity = None  # which they refuse
    made = layer({"name": name, **BOUNDED.get(name, {})}, capacity=capacity).to(free_dtype)
    made.train(not made.moe.router.waits)
    assert not made.moe.router.waits
    x, ids = batch(free_dtype)
    mask = ids > 3
    made(x, mask=mask, token_ids=ids).sum().backward()  # compiled and allocated from here on
    with host_never_waits():
        made(x.requires_grad_(), mask=mask, token_ids=ids).sum().backward()


@pytest.mark.parametrize("name", ["switch", "top_k", "expert_choice", "sigmoid_top_k"])
def test_a_cuda_graph_of_a_layer_holds_for_other_tokens(name: str) -> None:
    made = layer(name).bfloat16().eval()
    x, ids = batch(torch.bfloat16)
    held = x.clone()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        made(held, token_ids=ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = made(held, token_ids=ids)
    for seed in range(3):
        torch.manual_seed(seed)
        held.copy_(torch.randn_like(held))
        graph.replay()
        with torch.no_grad():
            expected = made(held, token_ids=ids)
        # Tokens of a varying number of experts are summed by atomic additions, in any order.
        rounding = 0.02 if name == "expert_choice" else 0.0
        torch.testing.assert_close(out, expected, atol=rounding, rtol=rounding)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize("name", ["switch", "top_k"])
def test_compiled_layers_are_those_of_eager(name: str) -> None:
    torch._dynamo.reset()
    made = layer(name).bfloat16()
    compiled = torch.compile(made, fullgraph=True)
    x, ids = batch(torch.bfloat16)
    results = []
    for module in (made, compiled):
        made.zero_grad()
        leaf = x.detach().requires_grad_()
        y = module(leaf, token_ids=ids)
        y.float().square().sum().backward()
        results.append([y, leaf.grad, made.moe.experts.wi.grad])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["switch", "top_k", "soft", "expert_choice"])
def test_autocast_keeps_gates_in_float32_and_masters_too(name: str) -> None:
    made = layer(name)
    x, ids = batch()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = made(x, token_ids=ids)
    exact = made(x, token_ids=ids)
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.1)
    y.float().sum().backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, key


def test_dropout_draws_on_the_device() -> None:
    made = layer("switch", dropout=0.5).train()
    x, _ = batch()
    torch.manual_seed(3)
    first = made(x)
    torch.manual_seed(3)
    assert torch.equal(made(x), first)
    assert not torch.equal(made(x), first)


@pytest.mark.parametrize("router", ["switch", {"name": "top_k", "k": 2}], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("tokens", [512, 40_000])
def test_reduced_precision_is_near_float64_with_dropped_tokens_and_padding(
    router: str | dict[str, object], activation: str, tokens: int
) -> None:
    capacity = {"name": "first_come", "factor": 0.7}
    exact = layer(router, activation=activation, capacity=capacity).double()
    narrow = copy.deepcopy(exact).bfloat16()
    for parameter, wide in zip(narrow.parameters(), exact.parameters(), strict=True):
        wide.data.copy_(parameter.data)
    torch.manual_seed(2)
    x = torch.randn(1, tokens, D_MODEL, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(1, tokens, device="cuda") < 0.9
    torch.full((tokens, 4 * D_FF), float("nan"), device="cuda")  # what memory is given out with
    found = narrow.moe(x.requires_grad_(), mask=mask)
    routing = exact.moe.route
    # In float64 a token near a tie would go elsewhere: both take the same way.
    exact.moe.route = lambda tokens: as_float64(found[1])  # type: ignore[method-assign]
    there = x.detach().double().requires_grad_()
    expected, _ = exact.moe(there, mask=mask)
    exact.moe.route = routing  # type: ignore[method-assign]
    near(found[0], expected)
    grad = torch.randn_like(expected)
    found[0].backward(grad.to(x.dtype))
    expected.backward(grad)
    for name in ("wi", "wo") if activation == "relu" else ("wi_0", "wi_1", "wo"):
        near(*(m.moe.experts.get_parameter(name).grad for m in (narrow, exact)))
    with torch.no_grad():
        near(narrow.moe(x, mask=mask)[0], expected)


def as_float64(routing: Routing) -> Routing:
    return replace(routing, assignment=replace(routing.assignment, weight=detached(routing)))


def detached(routing: Routing) -> Tensor:
    return routing.assignment.weight.detach().double()


def near(found: Tensor, expected: Tensor) -> None:
    assert bool(torch.isfinite(found).all())
    assert (found.double() - expected).norm() < 0.02 * expected.norm()
