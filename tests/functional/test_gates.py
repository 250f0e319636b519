"""Probabilities in huge pages are those of softmax, with its gradients."""

from __future__ import annotations

import pytest
import torch

from moezoo.functional.gates import gate_probs
from moezoo.ops import memory


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_LARGE", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4)])
def test_large_probabilities_are_the_softmax_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    slope = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(gate_probs(logits), logits.softmax(-1))
    found = torch.autograd.grad((gate_probs(logits) * slope).sum(), logits)
    expected = torch.autograd.grad((logits.softmax(-1) * slope).sum(), logits)
    assert torch.equal(gate_probs(logits), logits.softmax(-1))
    assert torch.equal(found[0], expected[0])


def test_large_probabilities_differentiate_twice() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gate_probs, (logits,))
    assert torch.autograd.gradgradcheck(gate_probs, (logits,))
