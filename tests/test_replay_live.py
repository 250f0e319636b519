"""Replay with live weights: the recorded pairs, weighed by the routers as they are now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moezoo
from moezoo import capacity, routers, traces
from moezoo.errors import ConfigError, RoutingError
from moezoo.pairing import pair_refusal
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router
from moezoo.traces import Trace
from moezoo.traces.players import places_of

SIZES = {"d_model": 8, "num_experts": 4, "vocab_size": 16}
NAMES = [n for n in routers.names() if routers.registry.get(n).__module__.startswith("moezoo.")]
TAKING = [name for name in NAMES if routers.build(name, **SIZES).takes_given]
OPTIONS: list[dict[str, Any]] = [
    *({"name": name} for name in TAKING),
    {"name": "switch", "jitter": 0.3, "weight": "unit"},
    {"name": "top_k", "k": 3, "softmax": "after"},
    {"name": "top_k", "k": 2, "normalize": "after", "bias": True},
    {"name": "gshard", "second": "threshold", "threshold": 0.4},
    {"name": "sigmoid_top_k", "k": 2, "groups": 2, "scale": 2.5},
    {"name": "sinkhorn", "k": 2, "gate": "sigmoid"},
    {"name": "expert_threshold", "factor": 2.0, "max_choices": 3},
    {"name": "relu", "k": 2, "max_choices": 2},
]
POLICIES = ["switch", "batch_priority", "reroute"]  # that drop, reorder and move
CASES = [
    (spec, policy)
    for spec in OPTIONS
    for policy in POLICIES
    if pair_refusal(routers.build(spec, **SIZES), capacity.build(policy)) is None
]


class Stack(nn.Module):
    """Two sparse layers with residuals, each recomputed in backward if told so."""

    def __init__(self, recomputes: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"router": {"name": "top_k", "k": 2}, "capacity": "switch"} | options
        self.layers = nn.ModuleList(moezoo.SparseMLP(8, 8, 4, **settings) for _ in range(2))
        self.recomputes = recomputes
        with torch.no_grad():
            for layer in self.layers:
                for weight in layer.moe.router.parameters():
                    weight.add_(torch.randn_like(weight))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            run = checkpoint if self.recomputes else _called
            x = x + run(layer, x, mask=mask, use_reentrant=False)
        return x


def _called(layer: nn.Module, x: Tensor, *, mask: Tensor | None, use_reentrant: bool) -> Tensor:
    y: Tensor = layer(x, mask=mask)
    return y


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 10, 8, generator=generator).to(dtype)
    return x, torch.rand(3, 10, generator=generator) < 0.9


def run(model: Stack, *batch: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients of all parameters, with the random numbers of one seed."""
    model.zero_grad()
    torch.manual_seed(7)
    y = model(*batch)
    y.float().square().mean().backward()
    return y.detach(), [p.grad for p in model.parameters()]


def recorded(model: Stack, *batch: Tensor, probs: bool = False) -> Trace:
    torch.manual_seed(7)
    with moezoo.record(model) as tape, torch.no_grad():
        model(*batch)
    return traces.of(tape, probs=probs)


def routers_of(model: Stack) -> list[Router]:
    return [layer.moe.router for layer in model.layers]


def shaken(model: Stack) -> Stack:
    """The same model with other routers."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for router in routers_of(model):
            for weight in router.parameters():
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    return model


def test_every_router_with_probabilities_takes_pairs_that_others_chose() -> None:
    with_probs = {n for n in NAMES if routers.build(n, **SIZES).has_probs}
    assert with_probs <= set(TAKING)
    assert set(NAMES) - set(TAKING) == {"hash", "random", "soft", "streamed_switch"}


@pytest.mark.parametrize(("spec", "policy"), CASES, ids=str)
def test_the_same_selection_gives_the_bits_of_a_run_without_replay(
    spec: dict[str, Any], policy: str
) -> None:
    model = Stack(router=spec, capacity=policy).train()
    batch = inputs()
    trace = recorded(model, *batch)
    expected, gradients = run(model, *batch)
    with traces.replay(model, trace, weights="live"), moezoo.record(model) as tape:
        found, others = run(model, *batch)
    assert torch.equal(found, expected)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    differences = traces.compare(trace, traces.of(tape))
    assert all(d.agreement == 1.0 and d.weight == 0.0 for d in differences.values())


@pytest.mark.parametrize("spec", OPTIONS, ids=str)
def test_the_pairs_are_recorded_and_the_gradient_reaches_the_router(spec: dict[str, Any]) -> None:
    model = Stack(router=spec, capacity="dropless").train()
    batch = inputs()
    trace = recorded(model, *batch)
    shaken(model)
    with traces.replay(model, trace, weights="live"), moezoo.record(model) as tape:
        _, gradients = run(model, *batch)
    live = traces.of(tape)
    for name, difference in traces.compare(trace, live).items():
        assert difference.agreement == 1.0
        # Weights of 1 / stop-gradient stay 1, and have a gradient all the same.
        assert (difference.weight > 1e-3) == (spec.get("weight") != "unit"), name
    for router in routers_of(model):
        reached = [p.grad for p in router.parameters() if p.grad is not None]
        assert reached and all(bool(g.isfinite().all()) for g in reached)
        assert any(float(g.abs().max()) > 0 for g in reached)
    assert all(g is not None for g in gradients)
    with traces.replay(model, trace):
        run(model, *batch)
    for router in routers_of(model):  # recorded weights teach a router nothing
        assert all(p.grad is None or not p.grad.any() for p in router.parameters())


def test_weights_are_the_probabilities_of_the_recorded_experts() -> None:
    model = Stack(router="switch", capacity="dropless").train().double()
    x, _ = inputs(torch.float64)
    trace = recorded(model, x)
    shaken(model)
    with traces.replay(model, trace, weights="live"):
        found, gradients = run(model, x)
    flat = x.reshape(-1, 8)
    for layer, (call,) in zip(model.layers, trace.by_layer.values(), strict=True):
        probs = (flat @ layer.moe.router.classifier.weight.t()).softmax(-1)
        experts, pairs = layer.moe.experts, call.assignment
        assert isinstance(pairs, Assignment)
        rows = [
            experts.wo[e] @ (experts.wi[e] @ flat[t]).relu() * probs[t, e]
            for t, e in zip(pairs.token.tolist(), pairs.expert.tolist(), strict=True)
        ]
        flat = flat + torch.stack(rows)
    model.zero_grad()
    flat.square().mean().backward()
    torch.testing.assert_close(found, flat.detach().view_as(found))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_gates_stay_float32(dtype: torch.dtype) -> None:
    model = Stack(router={"name": "top_k", "k": 2}).train().to(dtype)
    x, mask = inputs(dtype)
    trace = recorded(model, x, mask)
    expected, _ = run(model, x, mask)
    with traces.replay(model, trace, weights="live"), moezoo.record(model) as tape:
        found, _ = run(model, x, mask)
    assert torch.equal(found, expected) and found.dtype == dtype
    for calls in tape.by_layer.values():
        assert isinstance(calls[0].assignment, Assignment)
        assert calls[0].assignment.weight.dtype == torch.float32


def test_a_saved_trace_is_replayed_and_recomputed_with_live_weights(tmp_path: Path) -> None:
    plain, saving = Stack().train(), Stack(recomputes=True).train()
    batch = inputs()
    recorded(plain, *batch).save(tmp_path / "run.safetensors")
    trace = traces.load(tmp_path / "run.safetensors")
    results = []
    for model in (shaken(plain), shaken(saving)):
        with traces.replay(model, trace, weights="live"):
            results.append(run(model, *batch))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("name", ["hash", "random", "soft", "streamed_switch"])
def test_a_router_without_such_weights_is_refused_by_name(name: str) -> None:
    spec = {"name": name, "vocab_size": 16} if name == "hash" else name
    policy = "dropless" if name == "soft" else "switch"
    model = moezoo.SparseMLP(8, 8, 4, router=spec, capacity=policy)
    said = f"layer 'moe': {type(model.moe.router).__name__} has no weights for pairs"
    with pytest.raises(ConfigError, match=said):
        with traces.replay(model, Trace({"moe": ()}), weights="live"):
            pass
    assert "route" not in vars(model.moe)


class Averse(routers.SwitchRouter):
    """A router of somebody else, whose forward knows tokens alone."""

    def forward(self, tokens: Tokens) -> Routing:  # type: ignore[override]
        return super().forward(tokens)


def test_a_router_of_ones_own_that_knows_tokens_alone_is_refused() -> None:
    model = moezoo.SparseMLP(8, 8, 4, router=Averse(8, 4))
    with pytest.raises(ConfigError, match="Averse has no weights.*weights='recorded'"):
        with traces.replay(model, Trace({"moe": ()}), weights="live"):
            pass


def test_pairs_that_are_not_of_this_router_are_refused() -> None:
    three, two = (Stack(router={"name": "top_k", "k": k}) for k in (3, 2))
    x, _ = inputs()
    with pytest.raises(RoutingError, match="expected 2 pairs of every token.*found 3 pairs"):
        with traces.replay(two, recorded(three, x), weights="live"):
            two(x)
    with pytest.raises(ConfigError, match="unknown weights; expected 'recorded' or 'live'"):
        with traces.replay(two, recorded(two, x), weights="fresh"):  # type: ignore[arg-type]
            pass


def test_an_admitted_pair_is_found_among_the_proposed_ones_in_any_order() -> None:
    token, expert = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([3, 1, 0, 1, 2, 2])
    kept, weight = torch.ones(6, dtype=torch.bool), torch.ones(6)
    offered = Assignment(token, expert, weight, kept, 3, 4, 3)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    admitted = replace(offered, token=token[order], expert=expert[order])
    assert places_of(Routing(offered, proposed=offered)) is None
    found = places_of(Routing(admitted, proposed=offered))
    assert found is not None and torch.equal(found, order)
    elsewhere = replace(offered, expert=torch.tensor([3, 3, 0, 1, 2, 2]))
    found = places_of(Routing(elsewhere, proposed=offered))
    assert found is not None and found.tolist() == [0, -1, 2, 3, 4, 5]
