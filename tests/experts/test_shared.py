"""The branch that every token takes."""

from __future__ import annotations

import pytest
import torch

import moezoo
from moezoo.errors import ConfigError
from moezoo.experts import FeedForward, SharedExpert


def test_a_shared_expert_adds_its_network_to_every_token() -> None:
    torch.manual_seed(0)
    layer = moezoo.SparseMLP(4, 6, 2, shared={"d_ff": 3})
    x = torch.randn(2, 5, 4)
    both, shared = layer(x), layer.moe.shared(x)
    layer.moe.shared = None
    assert torch.allclose(both, layer(x) + shared, atol=1e-6)


def test_a_gate_scales_each_token() -> None:
    torch.manual_seed(0)
    branch, x = SharedExpert(4, 6, gated=True), torch.randn(5, 4)
    wanted = branch.expert(x) * (x @ branch.gate.weight.T).sigmoid()
    assert torch.allclose(branch(x), wanted, atol=1e-6)


def test_padding_gets_nothing_from_the_shared_expert() -> None:
    layer = moezoo.SparseMLP(4, 6, 2, shared={"gated": True})
    y = layer(torch.randn(1, 3, 4), mask=torch.tensor([[True, True, False]]))
    assert y[0, 2].abs().sum() == 0


def test_a_model_gets_one_per_sparse_layer_from_its_config() -> None:
    config = moezoo.SwitchConfig(
        vocab_size=32,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_heads=2,
        num_layers=2,
        num_experts=2,
        shared_expert={"d_ff": 4, "gated": True},
    )
    model = moezoo.build(config)
    assert moezoo.SwitchConfig.from_json(config.to_json()) == config
    found = [m for m in model.modules() if isinstance(m, SharedExpert)]
    assert [branch.expert.d_ff for branch in found] == [4, 4]
    ids = torch.randint(32, (2, 5))
    assert torch.isfinite(model(ids, labels=ids).loss)


@pytest.mark.parametrize(("said", "scale"), [(0.1, 0.1), (1.0, 1.0), (None, 1.0)])
def test_every_feed_forward_of_a_model_starts_at_its_scale(
    said: float | None, scale: float
) -> None:
    config = moezoo.SwitchConfig(
        vocab_size=32,
        d_model=64,
        d_kv=4,
        d_ff=64,
        num_heads=2,
        num_layers=2,
        num_experts=2,
        experts={"name": "modules", "sizes": [64, 256]},
        shared_expert={"d_ff": 128},
        initializer_scale=said,
    )
    found = [m for m in moezoo.build(config, seed=0).modules() if isinstance(m, FeedForward)]
    assert len(found) == 6
    for module in found:
        for weight in module.parameters():
            wanted = (scale / weight.shape[-1]) ** 0.5
            assert 0.85 < weight.std().item() / wanted < 1.05


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no option 'gate'. Did you mean 'gated'"):
        moezoo.SparseMLP(4, 6, 2, shared={"gate": True})
