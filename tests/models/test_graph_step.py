"""Decoding in buffers that stay where they are: what a CUDA graph records, run eagerly on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from moezoo.models import graph_step
from moezoo.models import stepper as steppers
from moezoo.models.graph_step import GraphStep
from tests.models.test_step import MODELS, scores
from tests.models.tiny import source, tiny


class Replayed(GraphStep):
    """What replaying the graph computes, into the tensor that recording it gave."""

    device = "cpu"
    first_size = 4  # and twice that, and once more

    def _replay(self) -> None:
        assert self.graph is not None
        self.logits.copy_(self._logits(self.token))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that can be recorded."""
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graph_step, "never_waits", lambda _: True)


def by(steps: type[GraphStep] | None, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steppers, "STEPS", () if steps is None else (steps,))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_token_has_the_logits_of_the_decoder(
    name: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(**MODELS[name]).eval()
    asked = {"rows": sizes[0], "copies": sizes[1], "masked": sizes[0] > 1}
    by(None, monkeypatch)
    expected = scores(model, **asked, steps=10)
    monkeypatch.setattr(Replayed, "worth_from", 0)
    by(Replayed, monkeypatch)
    monkeypatch.setattr(graph_step, "_waits", lambda *_: False)  # a container may, on a GPU
    for ours, theirs in zip(scores(model, **asked, steps=10), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    {"repetition_penalty": 1.5, "return_scores": True},
]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("prompt", [None, source(3, 9, seed=2)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generated_tokens_are_the_same(
    options: dict[str, Any], prompt: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny().eval(), source(3)
    replays: list[int] = []
    replay = Replayed._replay

    def counted(self: Replayed) -> None:
        replays.append(self.length)
        replay(self)

    monkeypatch.setattr(Replayed, "_replay", counted)

    def generated(steps: type[GraphStep] | None) -> Any:
        by(steps, monkeypatch)
        torch.manual_seed(5)
        return model.generate(ids, max_new_tokens=12, decoder_input_ids=prompt, **options)

    expected, found = generated(None), generated(Replayed)
    assert replays
    if not isinstance(found, Tensor):
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("cuda")
def test_few_tokens_are_not_worth_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Replayed) -> Tensor:
        raise AssertionError("recorded")

    by(Replayed, monkeypatch)
    monkeypatch.setattr(Replayed, "_recorded", record)
    model = tiny().eval()
    model.generate(source(), max_new_tokens=7)
    with pytest.raises(AssertionError, match="recorded"):
        model.generate(source(), max_new_tokens=8)
    model.generate(source(), max_new_tokens=8, use_cache=False)


@pytest.mark.usefixtures("cuda")
def test_a_graph_that_finds_no_memory_leaves_the_tokens_to_the_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def record(self: Replayed) -> Tensor:
        raise torch.OutOfMemoryError

    model, ids = tiny().eval(), source(2)
    expected = model.generate(ids, max_new_tokens=9)
    by(Replayed, monkeypatch)
    monkeypatch.setattr(Replayed, "_recorded", record)
    assert torch.equal(model.generate(ids, max_new_tokens=9), expected)


@pytest.mark.usefixtures("cuda")
@torch.no_grad()
def test_what_a_graph_would_not_repeat_is_left_to_the_modules() -> None:
    model, memory = tiny().eval(), torch.randn(1, 3, 16)
    assert Replayed.fits(model, memory)
    assert not Replayed.fits(model.train(), memory)
    assert Replayed.fits(model.eval(), memory)
    with torch.enable_grad():
        assert not Replayed.fits(model, memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not Replayed.fits(model, memory)
    for name in ("shared", "decoder.blocks.1.mlp.router", "decoder.final_norm"):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
        assert not Replayed.fits(model, memory), name
        handle.remove()
    model.encoder.final_norm.register_forward_hook(lambda *_: None)  # which has run
    assert Replayed.fits(model, memory)
    model.head = model.head
    assert not Replayed.fits(model, memory)
    del model.head
    model.decoder.final_norm = type("Own", (nn.Identity,), {"__module__": "theirs"})()
    assert not Replayed.fits(model.eval(), memory)


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
    assert not GraphStep.fits(tiny().eval(), torch.zeros(1, 1, 16))
