"""The other half of the promise: where nobody looks in, the short way is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.experts import stacked
from moezoo.functional import gates, grouped_mlp, streamed
from moezoo.models import attention, feed_forward
from moezoo.models.host_step import HostStep, _Lone
from moezoo.routers import SwitchRouter

CONFIG = moezoo.SwitchConfig(
    vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_experts=4
)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[str]]:
    """Follow a function of a module: a list that grows with every call."""

    def follow(home: Any, name: str) -> list[str]:
        calls: list[str] = []
        function = getattr(home, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(home, name, call)
        return calls

    return follow


def test_a_built_decoder_steps_apart_and_passes_its_sparse_layers_by() -> None:
    model = moezoo.build(CONFIG).eval()
    memory = torch.randn(1, 3, 16)
    with torch.no_grad():
        assert HostStep.fits(model, memory)
        made = HostStep(model, memory, None, rows=1)
    passed_by = [layer.mlp for layer in made.layers if type(layer.mlp) is _Lone]
    assert len(passed_by) == len(CONFIG.decoder_sparse) > 0


def test_generation_of_one_sequence_calls_no_sparse_layer_after_its_prompt(
    counted: Callable[[Any, str], list[str]],
) -> None:
    model = moezoo.build(CONFIG).eval()
    calls = counted(SwitchRouter, "alone")
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=5, min_new_tokens=5)
    assert len(calls) >= 4


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_one_token_takes_the_way_for_one_token(
    activation: str, counted: Callable[[Any, str], list[str]]
) -> None:
    calls = counted(stacked, "lone_mlp")
    layer = moezoo.SparseMLP(8, 16, 4, activation=activation).eval()
    with torch.no_grad():
        layer(torch.randn(1, 8))
    assert calls == ["lone_mlp"]


@pytest.mark.parametrize("router", ["switch", "top_k", "gshard", "sinkhorn", "expert_choice"])
def test_a_built_gate_is_read_not_called(
    router: str, counted: Callable[[Any, str], list[str]]
) -> None:
    called, read = counted(gates, "functional_call"), counted(gates, "gate_logits")
    layer = moezoo.SparseMLP(8, 16, 4, router=router).bfloat16()
    layer(torch.randn(6, 8, dtype=torch.bfloat16))
    assert read and not called


def test_a_built_streamed_router_streams(counted: Callable[[Any, str], list[str]]) -> None:
    calls = counted(streamed, "_chunks")
    moezoo.SparseMLP(8, 16, 4, router="streamed_switch")(torch.randn(6, 8))
    assert calls


def test_training_on_a_cpu_takes_the_steps_written_by_hand(
    counted: Callable[[Any, str], list[str]],
) -> None:
    places: list[tuple[Any, str]] = [
        (attention, "attention_with_dropout"),
        (feed_forward, "relu_dropout"),
        (grouped_mlp._FusedMLP, "apply"),
    ]
    calls = [counted(home, name) for home, name in places]
    model = moezoo.build(CONFIG, seed=0).train()
    ids = torch.tensor([[3, 4, 5]])
    loss: Tensor = model(ids, labels=ids).loss
    loss.backward()
    assert all(calls)
