"""Decoding in buffers that stay where they are: what a CUDA graph records, run eagerly on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moezoo.models import graph_step
from moezoo.models import stepper as steppers
from moezoo.models.graph_step import GraphStep, may_be_a_graph
from moezoo.models.stepper import Stepper
from tests.models.test_step import MODELS, scores
from tests.models.tiny import source, tiny


def eagerly(self: Stepper, *_: object) -> GraphStep:
    return GraphStep(self.model, self.memory, self.real, rows=self.rows, graph=False)


def of_the_cache(patch: pytest.MonkeyPatch, model: torch.nn.Module, **sizes: Any) -> list[Tensor]:
    with patch.context() as context:
        context.setattr(steppers, "steps_apart", lambda *_: False)
        return scores(model, **sizes)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_token_has_the_logits_of_the_decoder(
    name: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(**MODELS[name]).eval()
    asked = {"rows": sizes[0], "copies": sizes[1], "masked": sizes[0] > 1}
    expected = of_the_cache(monkeypatch, model, **asked, steps=10)
    monkeypatch.setattr(steppers, "steps_apart", lambda *_: False)
    monkeypatch.setattr(steppers, "_WORTH_A_GRAPH", 0)
    monkeypatch.setattr(Stepper, "_graph", eagerly)
    monkeypatch.setattr(graph_step, "FIRST_SIZE", 4)  # and twice that, and once more
    for found, wanted in zip(scores(model, **asked, steps=10), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompt", [None, source(3, 9, seed=2)])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generated_tokens_are_the_same(
    options: dict[str, int], prompt: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny().eval(), source(3)
    asked = {"max_new_tokens": 12, "decoder_input_ids": prompt, **options}
    expected = model.generate(ids, **asked)
    monkeypatch.setattr(steppers, "steps_apart", lambda *_: False)
    monkeypatch.setattr(Stepper, "_graph", eagerly)
    monkeypatch.setattr(graph_step, "FIRST_SIZE", 4)
    assert torch.equal(model.generate(ids, **asked), expected)


def test_few_tokens_are_not_worth_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Stepper) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr(steppers, "steps_apart", lambda *_: False)
    monkeypatch.setattr(Stepper, "_graph", record)
    model = tiny().eval()
    model.generate(source(), max_new_tokens=7)
    with pytest.raises(AssertionError, match="recorded"):
        model.generate(source(), max_new_tokens=8)
    model.generate(source(), max_new_tokens=8, use_cache=False)


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, False),
        ({"num_experts": 0}, False),
        ({"router": "relu"}, True),
        ({"router": {"name": "relu", "max_choices": 2}}, False),
        ({"router": "base", "allow_noncausal": True}, False),  # in evaluation
        ({"capacity": {"name": "random_order", "seed": 1}, "allow_noncausal": True}, True),
        ({"experts": "modules"}, True),
        ({"experts": {"name": "zero", "experts": "modules"}}, True),
    ],
)
def test_what_makes_the_host_wait_is_known_beforehand(
    options: dict[str, Any], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_step, "never_waits", lambda _: True)
    modules = list(tiny(**options).eval().modules())
    assert graph_step._waits(modules, torch.zeros(1)) is waits


def test_exact_products_of_float32_make_the_host_wait() -> None:
    assert graph_step._waits(list(tiny().modules()), torch.zeros(1))
    assert not graph_step._waits(list(tiny(num_experts=0).modules()), torch.zeros(1))


@torch.no_grad()
def test_a_cpu_has_no_graphs() -> None:
    assert not may_be_a_graph(tiny().eval(), torch.zeros(1, 1, 16))
