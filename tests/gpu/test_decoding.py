"""Decoding on a GPU: recorded steps give the tokens of eager ones, on the CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moezoo.models import stepper
from moezoo.models.graph_step import GraphStep
from tests.models.tiny import source, tiny

OPTIONS = ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1})
MODELS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "dense": ({"num_experts": 0}, torch.float32),
    "switch": ({}, torch.float32),
    "two choices": ({"router": {"name": "top_k", "k": 2}}, torch.float32),
    "by token": ({"router": "hash"}, torch.float32),
    "bfloat16": ({}, torch.bfloat16),
    "float16": ({"feed_forward_proj": "gated-gelu"}, torch.float16),
}


@pytest.fixture(autouse=True)
def rounded() -> Iterator[None]:
    """Products of float32 by kernels that the host does not wait for."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def generated(model: nn.Module, ids: Tensor, options: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    found: Tensor = model.generate(ids, max_new_tokens=20, min_new_tokens=20, **options)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_give_the_tokens_of_eager_ones(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, dtype = MODELS[name]
    model, ids = tiny(**overrides).eval().cuda().to(dtype), source(batch=3).cuda()
    recorded: list[GraphStep] = []
    record = GraphStep._recorded

    def counted(self: GraphStep) -> Tensor:
        recorded.append(self)
        return record(self)

    monkeypatch.setattr(GraphStep, "_recorded", counted)
    monkeypatch.setattr(GraphStep, "first_size", 4)  # grows to 8, 16 and 32
    found = generated(model, ids, options)
    assert len(recorded) == 4
    monkeypatch.setattr(stepper, "STEPS", ())
    eager = generated(model, ids, options)
    # Sums over as many places as the buffers have are rounded otherwise than over those in use.
    assert (found == eager).float().mean() > 0.9
    assert len(recorded) == 4
    torch.randn(3, device="cuda")  # the random numbers of the device are in order


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_exact_tokens_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    torch.set_float32_matmul_precision("highest")
    model, ids = tiny().eval(), source(batch=3)
    here = generated(model, ids, options)
    model.cuda()
    with torch.no_grad():
        assert not GraphStep.fits(model, torch.zeros(1, device="cuda"))  # exact float32 waits
    assert torch.equal(generated(model, ids.cuda(), options).cpu(), here)
