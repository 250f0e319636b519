"""Routing traces: saved, replayed, compared and questioned; recomputation routes alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moezoo
from moezoo import capacity, traces
from moezoo.errors import ConfigError, CorruptFile, RoutingError, SaveError
from moezoo.recording import Tape
from moezoo.traces import Trace
from moezoo.traces.calls import flattened


class Stack(nn.Module):
    """Two sparse layers with residuals, optionally checkpointed."""

    def __init__(self, reentrant: bool | None = None, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"router": {"name": "top_k", "k": 2}, "capacity": "switch"} | options
        self.layers = nn.ModuleList(moezoo.SparseMLP(8, 8, 4, **settings) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x, mask=mask)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def inputs() -> Tensor:
    return torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(3))


def recorded(model: nn.Module, *, mask: Tensor | None = None, probs: bool = False) -> Trace:
    with moezoo.record(model) as tape:
        model(inputs(), mask) if mask is not None else model(inputs())
    return traces.of(tape, probs=probs)


def shaken(model: Stack) -> Stack:
    """The same model with other routers."""
    for layer in model.layers:
        nn.init.normal_(layer.moe.router.classifier.weight)
    return model


@pytest.mark.parametrize("router", ["switch", "expert_choice", "relu", "soft"])
def test_a_saved_trace_comes_back_equal(router: str, tmp_path: Path) -> None:
    policy = "dropless" if router == "soft" else "switch"
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.8
    model = Stack(router=router, capacity=policy, group="sequence").train()
    trace = recorded(model, mask=mask, probs=True)
    trace.save(tmp_path / "a trace.safetensors")
    back = traces.load(tmp_path / "a trace.safetensors")
    assert list(back.by_layer) == ["layers.0.moe", "layers.1.moe"]
    for layer, calls in trace.by_layer.items():
        for call, other in zip(calls, back.by_layer[layer], strict=True):
            assert flattened(call)[1] == flattened(other)[1]
            one, two = flattened(call)[0], flattened(other)[0]
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(d.agreement == 1.0 and d.first is None for d in traces.compare(trace, back).values())


def test_replaying_reproduces_the_output_bit_for_bit_whatever_the_routers_say() -> None:
    model = Stack().train()
    trace, y = recorded(model), model(inputs())
    shaken(model)
    assert not torch.equal(model(inputs()), y)
    with traces.replay(model, trace):
        again = model(inputs())
    assert torch.equal(again, y)
    assert not torch.equal(model(inputs()), y)  # the routers are back


def test_replayed_layers_report_live_logits_and_recorded_pairs() -> None:
    model = Stack().train()
    trace = recorded(model)
    shaken(model)
    with traces.replay(model, trace), moezoo.record(model) as tape:
        model(inputs())
    difference = traces.compare(trace, traces.of(tape))
    assert all(d.agreement == 1.0 and d.weight == 0.0 for d in difference.values())
    tape.loss({"load_balance": 1.0}).backward()
    assert model.layers[0].moe.router.classifier.weight.grad is not None


def test_replaying_another_number_of_calls_or_tokens_is_refused() -> None:
    model = Stack()
    trace = recorded(model)
    with pytest.raises(RoutingError, match="more often than was recorded"):
        with traces.replay(model, trace):
            model(inputs())
            model(inputs())
    with pytest.raises(RoutingError, match="less often than was recorded"):
        with traces.replay(model, trace):
            pass
    with pytest.raises(RoutingError, match="another number of tokens"):
        with traces.replay(model, trace):
            model(inputs()[:1])
    assert all("route" not in layer.moe.__dict__ for layer in model.layers)


def test_replaying_into_another_model_is_refused() -> None:
    trace = recorded(Stack())
    with pytest.raises(ConfigError, match="of another model"):
        with traces.replay(moezoo.SparseMLP(8, 8, 4), trace):
            pass
    other = Stack()
    for layer in other.layers:
        layer.moe = moezoo.SparseMLP(8, 8, 5).moe
    with pytest.raises(ConfigError, match="another number of experts; expected 5, found 4"):
        with traces.replay(other, trace):
            pass


def test_comparison_finds_the_first_token_that_went_elsewhere() -> None:
    model = Stack(router="switch", capacity="dropless")
    trace = recorded(model)
    call = trace.by_layer["layers.1.moe"][0]
    a = call.assignment
    expert = a.expert.clone()
    expert[[7, 20]] = (expert[[7, 20]] + 1) % 4
    changed = traces.replace(call, assignment=traces.replace(a, expert=expert))
    other = Trace({**trace.by_layer, "layers.1.moe": (changed,)})
    found = traces.compare(trace, other)
    assert found["layers.0.moe"].first is None
    assert found["layers.1.moe"].first == (0, 7)
    assert found["layers.1.moe"].agreement == pytest.approx(28 / 30)


def test_comparison_reports_the_largest_difference_of_weights() -> None:
    model = Stack(router="switch", capacity="dropless")
    trace = recorded(model)
    call = trace.by_layer["layers.0.moe"][0]
    weight = call.assignment.weight.clone()
    weight[4] += 0.25
    changed = traces.replace(call, assignment=traces.replace(call.assignment, weight=weight))
    other = Trace({**trace.by_layer, "layers.0.moe": (changed,)})
    assert traces.compare(trace, other)["layers.0.moe"].weight == pytest.approx(0.25)


def test_comparing_other_input_is_refused() -> None:
    model = Stack()
    trace = recorded(model)
    with moezoo.record(model) as tape:
        model(inputs()[:2])
    with pytest.raises(ConfigError, match="not of the same input"):
        traces.compare(trace, traces.of(tape))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_what_a_factor_would_have_dropped_is_what_it_drops(factor: float) -> None:
    trace = recorded(Stack(capacity="dropless"))
    policy = capacity.build({"name": "first_come", "factor": factor, "order": "token"})
    asked = traces.dropped(trace, policy)
    limited = Stack(capacity=policy)
    with moezoo.record(limited) as tape:
        limited.layers[0](inputs())
    stats = tape.stats()["layers.0.moe"]
    assert asked["layers.0.moe"] == pytest.approx(stats.dropped)


def test_asking_for_reroute_needs_probabilities() -> None:
    model = Stack(router="switch", capacity="dropless")
    policy = capacity.build({"name": "reroute", "factor": 1.0})
    with pytest.raises(ConfigError, match="Reroute needs probabilities.*probs=True"):
        traces.dropped(recorded(model), policy)
    assert set(traces.dropped(recorded(model, probs=True), policy).values()) == {0.0}


def test_asking_a_soft_layer_is_refused() -> None:
    model = Stack(router="soft", capacity="dropless")
    with pytest.raises(ConfigError, match="routes softly"):
        traces.dropped(recorded(model), capacity.build("first_come"))


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(CorruptFile, match="no readable trace"):
        traces.load(path)
    path.write_bytes(b"<html>")
    with pytest.raises(CorruptFile, match="no readable trace"):
        traces.load(path)
    path.write_bytes(traces.to_bytes({"w": torch.zeros(2)}))
    with pytest.raises(CorruptFile, match="not a trace"):
        traces.load(path)


def test_a_trace_with_impossible_pairs_is_refused(tmp_path: Path) -> None:
    trace = recorded(Stack(router="switch"))
    call = trace.by_layer["layers.0.moe"][0]
    wrong = traces.replace(call.assignment, expert=call.assignment.expert + 9)
    Trace({"m": (traces.replace(call, assignment=wrong),)}).save(tmp_path / "t.safetensors")
    with pytest.raises(CorruptFile, match="invariant 1"):
        traces.load(tmp_path / "t.safetensors")


def test_a_failed_save_leaves_the_old_trace_and_no_litter(tmp_path: Path) -> None:
    trace = recorded(Stack())
    with pytest.raises(SaveError, match="the trace was not written"):
        trace.save(tmp_path / "missing" / "t.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(SaveError):
        trace.save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


NOISY = [{"name": "switch", "jitter": 0.3}, "noisy_top_k", "random", "gshard"]


@pytest.mark.parametrize("router", NOISY, ids=str)
@pytest.mark.parametrize("policy", ["switch", "random_order"])
def test_recomputation_under_checkpointing_routes_and_trains_alike(
    router: object, policy: str
) -> None:
    gradients: list[list[Tensor]] = []
    for reentrant in (None, False):
        model = Stack(reentrant, router=router, capacity=policy).train()
        torch.manual_seed(5)
        with moezoo.record(model) as tape:
            model(inputs()).square().sum().backward()
        assert [len(calls) for calls in tape.by_layer.values()] == [1, 1]
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_recomputation_inside_a_replay_uses_the_recorded_pairs() -> None:
    plain, saving = Stack().train(), Stack(reentrant=False).train()
    trace = recorded(plain)
    gradients = []
    for model in (plain, saving):
        with traces.replay(shaken(model), trace):
            model(inputs()).square().sum().backward()
        gradients.append([p.grad for p in model.layers[0].moe.experts.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_reentrant_checkpointing_is_refused_where_a_loss_would_train_nothing() -> None:
    model = Stack(reentrant=True).train()
    x = inputs().requires_grad_()
    with moezoo.record(model) as tape:
        model(x)
    assert isinstance(tape, Tape)
    with pytest.raises(RoutingError, match="has no gradient.*use_reentrant=False"):
        tape.loss({"load_balance": 1.0})
