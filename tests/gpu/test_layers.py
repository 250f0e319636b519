"""Sparse layers on a GPU: the values of a CPU, no wait of the host, graphs, reduced precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import moezoo

D_MODEL, D_FF, EXPERTS = 64, 128, 8
# Routers whose decisions the host has to know: how many pairs there are, or a matching solved on
# the CPU. Their options or evaluation mode without that are below.
WAITING = {"base", "relu", "expert_threshold"}
NAMES = [n for n in moezoo.routers.names() if n not in WAITING]
BOUNDED = {"relu": {"max_choices": 2}, "expert_threshold": {"max_choices": 2}}


def layer(router: str | dict[str, object], **options: object) -> moezoo.SparseMLP:
    torch.manual_seed(0)
    made = moezoo.SparseMLP(D_MODEL, D_FF, EXPERTS, router=router, vocab_size=50, **options)
    return made.cuda()


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, 96, D_MODEL, device="cuda", dtype=dtype)
    return x, torch.randint(50, (4, 96), device="cuda")


@contextmanager
def no_wait() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error in here."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


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


@pytest.mark.parametrize("name", [*NAMES, *BOUNDED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capacity", [None, "dropless"])
def test_the_host_never_waits(name: str, dtype: torch.dtype, capacity: str | None) -> None:
    if capacity and (moezoo.routers.registry.get(name).soft or name == "expert_choice"):
        capacity = None
    if dtype == torch.float32 and not grouped_is_free_in_float32():
        pytest.xfail("F.grouped_mm of this torch reads the offsets of float32 products")
    made = layer({"name": name, **BOUNDED.get(name, {})}, capacity=capacity).to(dtype)
    x, ids = batch(dtype)
    mask = ids > 3
    made(x, mask=mask, token_ids=ids).sum().backward()  # compiled and allocated from here on
    with no_wait():
        made(x.requires_grad_(), mask=mask, token_ids=ids).sum().backward()


def grouped_is_free_in_float32() -> bool:
    x, weight = torch.ones(8, 16, device="cuda"), torch.ones(2, 16, 16, device="cuda")
    ends = torch.tensor([3, 8], dtype=torch.int32, device="cuda")
    try:
        with no_wait():
            torch.nn.functional.grouped_mm(x, weight, offs=ends)
    except RuntimeError:
        return False
    return True


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
            torch.testing.assert_close(out, made(held, token_ids=ids), atol=0.0, rtol=0.0)


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
