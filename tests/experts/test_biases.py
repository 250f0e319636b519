"""Stacked experts with biases equal a plain loop, by every way that a layer takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.experts import StackedExperts
from moezoo.functional.activations import activation
from moezoo.quantization import Int8Experts
from moezoo.testing import check_experts

COUNTS = torch.tensor([2, 0, 3])


def container(name: str) -> StackedExperts:
    torch.manual_seed(0)
    made = StackedExperts(4, 6, 3, activation=name, bias=True).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made.eval()


def plain(experts: StackedExperts, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    function, _ = activation(experts.activation)
    out = torch.zeros_like(rows)
    start = 0
    for e, count in enumerate(COUNTS.tolist()):
        for r in range(start, start + count):
            maps = {
                name: (getattr(experts, name)[e], getattr(experts, f"{name}_bias")[e])
                for name in experts.names
            }
            first, *others, outer = maps.values()
            hidden = function(first[0] @ rows[r] + first[1])
            for weight, bias in others:
                hidden = hidden * (weight @ rows[r] + bias)
            y = outer[0] @ hidden + outer[1]
            out[r] = y if weights is None else weights[r] * y
        start += count
    return out


@pytest.mark.parametrize("name", ["relu", "gelu", "gated-silu"])
def test_they_equal_a_plain_loop_with_and_without_a_gradient(name: str) -> None:
    experts, rows = container(name), torch.randn(7, 4, dtype=torch.float64)
    expected = plain(experts, rows)
    found = experts(rows, COUNTS)
    torch.testing.assert_close(found, expected)
    assert not found[5:].any()
    with torch.no_grad():
        torch.testing.assert_close(experts(rows, COUNTS), expected)
        torch.testing.assert_close(experts.alone(rows[2:3], 2), expected[2:3])
    parameters = list(experts.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), parameters), wanted)


@pytest.mark.parametrize("name", ["relu", "gated-silu"])
def test_weights_that_come_first_weigh_the_bias_too(name: str) -> None:
    experts, rows = container(name), torch.randn(7, 4, dtype=torch.float64)
    weights = torch.rand(7, dtype=torch.float64)
    expected = plain(experts, rows, weights)
    torch.testing.assert_close(experts(rows, COUNTS, weights), expected)
    rounded, rows = Int8Experts(container(name).float()), rows.float()
    with torch.no_grad():
        found = rounded(rows, COUNTS, weights.float())
        torch.testing.assert_close(found.double(), expected, atol=0.2, rtol=0.05)
        whole = rounded(rows, COUNTS) * weights.float()[:, None]
        torch.testing.assert_close(found, whole, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["relu", "gated-gelu"])
def test_they_keep_the_promises_of_a_container(name: str) -> None:
    check_experts({"name": "stacked", "bias": True, "activation": name}, examples=8)


def test_a_bias_counts_as_its_experts_and_starts_at_zero() -> None:
    experts = StackedExperts(4, 6, 3, bias=True)
    assert experts.expert_sizes() == (0, (2 * 24 + 6 + 4,) * 3)
    assert not experts.wi_bias.any() and not experts.wo_bias.any()
    with pytest.raises(ConfigError, match="bad bias"):
        StackedExperts(4, 6, 3, bias="yes")
