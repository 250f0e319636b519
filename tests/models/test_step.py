"""A decoding step equals the modules of the decoder, and leaves to them what they alone can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo.capacity import FirstCome
from moezoo.layer import MoE
from moezoo.models import stepper as steppers
from moezoo.models.host_step import HostStep, _Called, _Dense, _Lone
from moezoo.models.stepper import Stepper
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers import SwitchRouter
from tests.models.tiny import source, tiny

MODELS: dict[str, dict[str, Any]] = {
    "switch": {},
    "switch with a unit weight": {"router": {"name": "switch", "weight": "unit", "bias": True}},
    "capacity": {"capacity": {"name": "first_come", "limit": 1}},
    "as transformers": {"capacity": "transformers"},
    "dense": {"num_experts": 0},
    "gated": {"feed_forward_proj": "gated-gelu"},
    "a bias in every layer": {"position_bias_every_layer": True},
    "two choices": {"router": {"name": "top_k", "k": 2}},
    "by token": {"router": "hash"},
    "other experts": {"experts": "modules"},
    "tables of the stacks": {"own_embeddings": ("encoder", "decoder")},
    "deep": {"num_layers": 4, "num_decoder_layers": 3},
}


def stepper(model: nn.Module, *, rows: int, copies: int = 1, masked: bool = False) -> Stepper:
    ids = source(rows)
    mask = torch.ones_like(ids)
    mask[-1, 3:] = 0 if masked else 1
    memory, real, _ = model._encode(ids, mask)
    return Stepper(model, memory, real, rows=rows * copies, use_cache=True)


def sparse(step: Any) -> list[object]:
    """What a step makes of the sparse layers."""
    return [layer.mlp for layer in step.layers if type(layer.mlp) is not _Dense]


def scores(model: nn.Module, steps: int = 6, **sizes: Any) -> list[Tensor]:
    """Of each step after random tokens, the rows put in another order on the way."""
    step = stepper(model, **sizes)
    ids = torch.zeros(step.rows, 1, dtype=torch.int64)
    random = torch.Generator().manual_seed(4)
    found = []
    for number in range(steps):
        found.append(step.scores(ids).clone())  # the next one may overwrite them
        token = torch.randint(2, model.config.vocab_size, (ids.shape[0], 1), generator=random)
        ids = torch.cat([ids, token], 1)
        if number in (2, 34):
            order = torch.arange(ids.shape[0]).roll(1)
            step.reorder(order)
            ids = ids[order]
    return found


class Lowest(SwitchRouter):
    """Chooses otherwise, and inherits an `alone` that knows nothing of it."""

    def logits(self, x_TD: Tensor) -> Tensor:
        return -super().logits(x_TD)


class LowestAlone(Lowest):
    """The same, and says what it chooses for one token."""

    def alone(self, row: Tensor) -> tuple[int, float]:
        routing = self(Tokens(row))
        return int(routing.assignment.expert), float(routing.assignment.weight)


class KeepsNone(FirstCome):
    """Inherits a promise that its own `forward` breaks."""

    def forward(self, routing: Routing) -> Assignment:
        admitted = super().forward(routing)
        return replace(admitted, kept=torch.zeros_like(admitted.kept))


@pytest.mark.parametrize(
    ("part", "kind", "alone"),
    [("router", Lowest, False), ("router", LowestAlone, True), ("capacity", KeepsNone, False)],
)
@torch.no_grad()
def test_a_class_of_your_own_says_itself_what_holds_for_one_token(
    part: str, kind: type, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    for layer in (m for m in model.modules() if isinstance(m, MoE)):
        old = getattr(layer, part)
        new = kind(old.d_model, old.num_experts) if part == "router" else kind()
        new.load_state_dict(old.state_dict())
        setattr(layer, part, new.eval())
    step = stepper(model, rows=1).step
    assert {type(mlp) is _Lone for mlp in sparse(step)} == {alone}
    apart = scores(model, rows=1)
    monkeypatch.setattr(steppers, "STEPS", ())
    for a, b in zip(apart, scores(model, rows=1), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_equals_the_decoder_token_by_token(
    name: str, rounded: bool, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(**MODELS[name])
    if rounded:
        moezoo.quantize(model)
    rows, copies = sizes
    masked = rows > 1
    assert stepper(model, rows=rows, copies=copies).step is not None
    found = scores(model, rows=rows, copies=copies, masked=masked)
    monkeypatch.setattr(steppers, "STEPS", ())
    expected = scores(model, rows=rows, copies=copies, masked=masked)
    # A last bit more or less may round to another of 255 levels.
    tolerance = 0.2 if rounded else 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", ["switch", "dense", "two choices", "as transformers", "deep"])
def test_it_goes_on_after_a_prompt_as_the_modules_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(**MODELS[name]), source(2)
    prompt = source(2, 40, seed=3)  # longer than the first buffer
    asked = {"decoder_input_ids": prompt, "max_new_tokens": 6, "min_new_tokens": 6}
    found = [model.generate(ids, **asked, num_beams=n, return_scores=True) for n in (1, 3)]
    with torch.no_grad():
        assert stepper(model, rows=2).step is not None
    monkeypatch.setattr(steppers, "STEPS", ())
    for beams, ours in zip((1, 3), found, strict=True):
        theirs = model.generate(ids, **asked, num_beams=beams, return_scores=True)
        assert torch.equal(ours.sequences, theirs.sequences)
        for score, expected in zip(ours.scores, theirs.scores, strict=True):
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_keeps_every_key_when_its_buffer_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    found = scores(model, steps=70, rows=2)
    monkeypatch.setattr(steppers, "STEPS", ())
    for ours, theirs in zip(found, scores(model, steps=70, rows=2), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class Wrapped(nn.Module):
    """What a tool puts into a layer's place; it changes what the layer gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **more: Any) -> tuple[Tensor, Any]:
        y, routing = self.layer(x, **more)
        return 2 * y, routing


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_a_sparse_layer_that_a_tool_wraps_is_called_inside_the_step(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    for block in model.decoder.blocks:
        if block.sparse:
            block.mlp = Wrapped(block.mlp).eval()
    assert {type(mlp) for mlp in sparse(stepper(model, rows=rows).step)} == {_Called}
    apart = scores(model, rows=rows)
    monkeypatch.setattr(steppers, "STEPS", ())
    for ours, theirs in zip(apart, scores(model, rows=rows), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_it_would_pass_by_is_left_to_the_modules() -> None:
    model = tiny().eval()
    memory = torch.randn(1, 3, 16)
    assert HostStep.fits(model, memory)
    assert not HostStep.fits(model.double(), memory.double())
    assert not HostStep.fits(model.float().train(), memory)
    assert HostStep.fits(model.eval(), memory)
    with torch.enable_grad():
        assert not HostStep.fits(model, memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not HostStep.fits(model, memory)
    attention = model.decoder.blocks[0].attention
    handle = attention.register_forward_pre_hook(lambda *_: None)
    assert not HostStep.fits(model, memory)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not HostStep.fits(model, memory)
    handle.remove()
    attention.q = type("Other", (type(attention.q),), {})(16, 8)
    assert not HostStep.fits(model, memory)


def test_hooks_in_the_decoder_fire_as_often_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), source(1)

    def fired() -> tuple[dict[str, int], Tensor]:
        seen = dict.fromkeys((name for name, _ in model.decoder.named_modules()), 0)
        for name in seen:

            def hook(*_: object, name: str = name) -> None:
                seen[name] += 1

            handle = model.decoder.get_submodule(name).register_forward_hook(hook)
            out = model.generate(ids, max_new_tokens=2, min_new_tokens=2)
            handle.remove()
        return seen, out

    found = fired()
    monkeypatch.setattr(steppers, "STEPS", ())
    expected = fired()
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_recording_sees_the_routing_of_every_generated_token() -> None:
    model = tiny()
    with moezoo.record(model) as tape:
        model.generate(source(1), max_new_tokens=5, min_new_tokens=5)
    counts = {name: len(routings) for name, routings in tape.by_layer.items()}
    assert {name.split(".")[0]: n for name, n in counts.items()} == {"encoder": 1, "decoder": 5}
