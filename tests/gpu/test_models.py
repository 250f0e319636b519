"""Models on a GPU: logits, gradients, tokens and training as on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import moezoo
from tests.models.tiny import source, tiny


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model on the CPU and its copy on the GPU."""
    model = tiny().eval()
    return model, copy.deepcopy(model).cuda()


def test_logits_loss_and_gradients_are_those_of_the_cpu() -> None:
    results = []
    for model, device in zip(pair(), ("cpu", "cuda"), strict=True):
        ids, labels = source().to(device), source(length=5, seed=1).to(device)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        out = model.double()(ids, mask, labels=labels)
        out.loss.backward()
        grads = [p.grad.cpu() for p in model.parameters()]
        results.append([out.loss.cpu(), out.logits.cpu(), *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32(dtype: torch.dtype) -> None:
    here, there = pair()
    ids, labels = source(), source(length=5, seed=1)
    with torch.no_grad():
        exact = here(ids, labels=labels).logits
        found = there.to(dtype)(ids.cuda(), labels=labels.cuda()).logits
    # A token near a tie may take another expert in another precision: most of them agree.
    near = (found.float().cpu() - exact).abs() < 0.1 * exact.abs().max()
    assert near.float().mean() > 0.9


def test_statistics_and_traces_are_recorded_from_the_device() -> None:
    _, model = pair()
    with moezoo.record(model) as seen, torch.no_grad():
        model(source().cuda(), labels=source(length=5, seed=1).cuda())
    stats = seen.stats()
    assert stats
    assert all(sum(layer.load) == layer.offered for layer in stats.values())


def test_saved_from_a_gpu_it_loads_on_either(tmp_path: Path) -> None:
    here, there = pair()
    moezoo.save(there, tmp_path / "model")
    loaded = moezoo.load(tmp_path / "model")
    assert next(moezoo.load(tmp_path / "model", device="cuda").parameters()).is_cuda
    for ours, theirs in zip(loaded.parameters(), here.parameters(), strict=True):
        assert torch.equal(ours, theirs)
