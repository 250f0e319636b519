"""Attention with dropout against its composite, mask by mask."""

from __future__ import annotations

import pytest
import torch

from moezoo.functional import attention
from moezoo.functional.attention import attention_with_dropout
from moezoo.functional.dropout import LEVELS, dropout_mask


def composite(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    scores = query @ key.transpose(2, 3)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    threshold = round(p * LEVELS)
    mask = dropout_mask(weights.shape, threshold).to(weights.dtype)
    return (weights * mask * LEVELS / (LEVELS - threshold)) @ value


def inputs(bias: str) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    shapes = {"none": None, "position": (1, 2, 5, 7), "mask": (3, 1, 1, 7), "both": (3, 2, 5, 7)}
    given = [(3, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 4), shapes[bias]]
    return [
        None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in given
    ]


@pytest.mark.parametrize("bias", ["none", "position", "mask", "both"])
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_values_and_gradients_equal_the_composite(bias: str, p: float) -> None:
    query, key, value, added = inputs(bias)
    given = [tensor for tensor in (query, key, value, added) if tensor is not None]
    results = []
    for compute in (composite, lambda q, k, v, b, p: attention_with_dropout(q, k, v, b, p=p)):
        torch.manual_seed(1)
        out = compute(query, key, value, added, p)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", ["none", "position", "mask", "both"])
@pytest.mark.parametrize("fitting", [1, 2, 4])
def test_any_number_of_heads_and_sequences_at_once_is_the_same_attention(
    bias: str, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fitting: a head, a sequence of two heads, or two sequences of three at a time."""
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", fitting * 5 * 7)
    given = [tensor for tensor in inputs(bias) if tensor is not None]
    query, key, value, *added = given
    lost = torch.zeros(3, 2, 5, 7, dtype=torch.bool)
    for row in range(3):  # what was dropped, by values that point out their pair
        torch.manual_seed(1)
        points = torch.zeros(3, 2, 7, 7, dtype=torch.float64)
        points[row] = torch.eye(7)
        lost[row] = attention_with_dropout(query, key, points, *(added or [None]), p=0.4)[row] == 0
    scores = query @ key.mT if not added else query @ key.mT + added[0]
    scale = LEVELS / (LEVELS - round(0.4 * LEVELS))
    expected = scores.softmax(-1).masked_fill(lost, 0.0) @ value * scale
    torch.manual_seed(1)
    found = attention_with_dropout(query, key, value, *(added or [None]), p=0.4)
    assert 0 < lost.double().mean() < 1
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), given),
        torch.autograd.grad(expected.square().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_result_is_laid_out_for_the_map_behind_it() -> None:
    query, key, value, _ = inputs("none")
    out = attention_with_dropout(query, key, value, None, p=0.3)
    assert out.transpose(1, 2).is_contiguous()


def test_a_kept_graph_gives_the_same_gradient_twice() -> None:
    query, key, value, _ = inputs("none")
    out = attention_with_dropout(query, key, value, None, p=0.3).sum()
    first = torch.autograd.grad(out, [query, key, value], retain_graph=True)
    second = torch.autograd.grad(out, [query, key, value])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_reduced_precision_takes_the_composite() -> None:
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.bfloat16) for _ in range(3))
    out = attention_with_dropout(query, key, value, None, p=0.1)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
