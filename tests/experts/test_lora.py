"""One shared network with a low-rank difference per expert."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moezoo.errors import ConfigError
from moezoo.experts import LoraExperts


def test_all_experts_start_as_the_shared_network() -> None:
    torch.manual_seed(0)
    container = LoraExperts(4, 6, 3, activation="gated-gelu")
    rows = torch.randn(7, 4)
    out = container(rows, torch.tensor([3, 0, 4]))
    assert torch.equal(out, container.base(rows))


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_an_expert_computes_with_the_summed_weights(activation: str) -> None:
    torch.manual_seed(0)
    container = LoraExperts(4, 6, 2, rank=3, alpha=6.0, activation=activation).double()
    for parameter in container.parameters():
        torch.nn.init.normal_(parameter)
    rows, counts = torch.randn(7, 4, dtype=torch.float64), torch.tensor([3, 2])

    def weight(name: str, expert: int) -> torch.Tensor:
        delta = container.get_submodule(f"{name}_delta")
        low_rank = delta.get_parameter("b")[expert] @ delta.get_parameter("a")[expert]
        return container.base.get_parameter(f"{name}.weight") + 2.0 * low_rank

    out = container(rows, counts)
    for expert, part in ((0, rows[:3]), (1, rows[3:5])):
        function = container.base.function
        if container.base.gated:
            hidden = function(F.linear(part, weight("wi_0", expert)))
            hidden = hidden * F.linear(part, weight("wi_1", expert))
        else:
            hidden = function(F.linear(part, weight("wi", expert)))
        wanted = F.linear(hidden, weight("wo", expert))
        assert torch.allclose(out[3 * expert : 3 * expert + len(part)], wanted, atol=1e-10)
    assert out[5:].abs().sum() == 0


def test_an_expert_costs_its_ranks_only() -> None:
    def size(num_experts: int) -> int:
        return sum(p.numel() for p in LoraExperts(16, 64, num_experts, rank=2).parameters())

    assert size(5) - size(4) == 2 * 2 * (16 + 64)


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="bad rank"):
        LoraExperts(4, 6, 2, rank=0)
