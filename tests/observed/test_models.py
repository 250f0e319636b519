"""Whoever looks in on a part of a model is seen when it decodes, and tools that wrap parts work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo import traces
from moezoo.models import stepper
from tests.models.test_step import scores
from tests.models.tiny import source, tiny

from .observers import QUICK, code, compiled

MLP = "decoder.blocks.1.mlp"
PARTS = [
    MLP,
    f"{MLP}.router",
    f"{MLP}.router.classifier",
    f"{MLP}.capacity",
    f"{MLP}.experts",
    f"{MLP}.experts.dropout",
    "decoder.blocks.0.mlp",
    "decoder.blocks.0.mlp.wi",
    "decoder.blocks.0.mlp.dropout",
    "decoder.blocks.0.attention.q",
    "decoder.blocks.0.attention.position_bias",
    "decoder.blocks.0.cross_attention.o",
    "decoder.blocks.0.mlp_norm",
    "decoder.final_norm",
    "shared",
]


def changed(inputs: Any, output: Any) -> Any:
    """Other values of the same kind."""
    if isinstance(output, Tensor):
        return 1.5 * output
    if isinstance(output, tuple):
        return (1.5 * output[0], *output[1:])
    if hasattr(output, "assignment"):
        assignment = output.assignment
        return replace(output, assignment=replace(assignment, weight=1.5 * assignment.weight))
    return replace(output, weight=1.5 * output.weight)


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_a_step_of_decoding_sees_what_the_modules_see(
    part: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny().eval()
    plain = scores(model, steps=2, rows=1)
    with QUICK[way](model, part, changed):
        found = scores(model, steps=2, rows=1)
        with monkeypatch.context() as patch:
            patch.setattr(stepper, "STEPS", ())
            expected = scores(model, steps=2, rows=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[-1], plain[-1], atol=1e-4)


@torch.no_grad()
def test_a_replayed_trace_is_followed_when_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny().eval(), source(1)

    def decoded() -> Tensor:
        return model.generate(ids, max_new_tokens=3, min_new_tokens=3)

    with moezoo.record(model) as tape:
        decoded()
    trace = traces.of(tape)
    elsewhere = {
        layer: tuple(
            replace(call, assignment=replace(call.assignment, weight=-call.assignment.weight))
            for call in calls
        )
        for layer, calls in trace.by_layer.items()
    }
    with traces.replay(model, traces.Trace(elsewhere)):
        found = decoded()
    monkeypatch.setattr(stepper, "STEPS", ())
    with traces.replay(model, traces.Trace(elsewhere)):
        assert torch.equal(found, decoded())


@torch.no_grad()
def test_compiled_parts_of_a_model_are_called() -> None:
    model, ids = tiny().eval(), source(2)
    plain = model(ids, labels=ids).logits
    for part in (MLP, "encoder.blocks.1.mlp.experts", "decoder.blocks.0.attention.position_bias"):
        with compiled(model, part, lambda _, output: output):
            torch.testing.assert_close(model(ids, labels=ids).logits, plain)
            model.generate(ids, max_new_tokens=2)


TARGETS = ["classifier", "shared", "position_bias", "q", "o", "wi", "wo"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts": "lora"},
        {"experts": "modules"},
        {"router": "noisy_top_k"},
        {"router": "cosine"},
        {"shared_expert": {"d_ff": 4, "gated": True}},
    ],
)
def test_a_model_with_low_rank_adapters_computes_what_it_computes_merged(
    options: dict[str, Any],
) -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny(**options).eval(), source(2)
    extra = [name for name in ("noise", "projection", "gate") if _has(model, name)]
    found = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    targets = [n for n in found if n.rpartition(".")[2] in (*TARGETS, *extra)]
    pattern = "|".join(map(re.escape, targets))  # whole names, where a list is of endings
    config = peft.LoraConfig(r=2, target_modules=pattern, init_lora_weights=False)
    plain = model(ids, labels=ids).logits
    adapted = peft.get_peft_model(model, config).eval()
    found_logits = adapted.base_model.model(ids, labels=ids).logits
    tokens = adapted.base_model.model.generate(ids, max_new_tokens=3)
    merged = adapted.merge_and_unload()
    expected = merged(ids, labels=ids).logits
    torch.testing.assert_close(found_logits, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(tokens, merged.generate(ids, max_new_tokens=3))
    assert not torch.allclose(expected, plain, atol=1e-2)


def _has(model: nn.Module, leaf: str) -> bool:
    return any(name.rpartition(".")[2] == leaf for name, _ in model.named_modules())


@torch.no_grad()
def test_an_offloaded_model_computes_and_decodes_the_same() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny().eval(), source(2)
    plain, tokens = model(ids, labels=ids).logits, model.generate(ids, max_new_tokens=3)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(ids, labels=ids).logits, plain)
    assert torch.equal(model.generate(ids, max_new_tokens=3), tokens)


def test_what_is_observed_is_not_rounded() -> None:
    model = tiny()
    model.get_submodule("decoder.blocks.0.mlp.wi").register_forward_hook(lambda *_: None)
    done = moezoo.quantize(model)
    assert "decoder.blocks.0.mlp.wi" not in done.quantized
    assert "has hooks" in done.skipped["decoder.blocks.0.mlp.wi.weight"]


@torch.no_grad()
def test_weights_with_operators_of_their_own_are_left_to_them() -> None:
    """As a quantising tool makes them, in float32: they know `F.linear`, and no product of ours."""
    coded, plain = tiny().eval(), tiny().eval()
    for name, module in coded.named_modules():
        if isinstance(module, nn.Linear):
            code(module)
            rounded = module.weight.rounded * module.weight.scale
            plain.get_submodule(name).weight.copy_(rounded)
    ids = source()
    torch.testing.assert_close(coded(ids, labels=ids).logits, plain(ids, labels=ids).logits)
    torch.testing.assert_close(scores(coded, steps=3, rows=2), scores(plain, steps=3, rows=2))
