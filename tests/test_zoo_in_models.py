"""Every component works by name in a whole model: loss, gradients, adaptation, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moezoo
from moezoo import capacity, experts, routers
from moezoo.errors import ConfigError
from moezoo.layer import MoE

OURS = [n for n in routers.names() if routers.registry.get(n).__module__.startswith("moezoo.")]


def tiny(**options: Any) -> nn.Module:
    settings = {
        "vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2,
        "num_experts": 4, "dropout_rate": 0.0, "allow_noncausal": True,
    }  # fmt: skip
    return moezoo.build(moezoo.SwitchConfig(**(settings | options)), seed=0)


def ids(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(2, 32, (rows, length), generator=torch.Generator().manual_seed(1))


def check_training_step(model: nn.Module) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with moezoo.record(model) as tape:
        out = model.train()(ids(), mask, labels=ids(length=5))
    out.loss.backward()
    tape.adapt()
    assert torch.isfinite(out.loss)
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", OURS)
def test_a_model_trains_with_every_router(name: str) -> None:
    check_training_step(tiny(router=name))


@pytest.mark.parametrize("name", capacity.names())
def test_a_model_trains_with_every_policy(name: str) -> None:
    check_training_step(tiny(capacity=name))


@pytest.mark.parametrize("name", experts.names())
def test_a_model_trains_with_every_container(name: str) -> None:
    check_training_step(tiny(experts=name, feed_forward_proj="gated-gelu"))


@pytest.mark.parametrize("name", OURS)
def test_real_outputs_never_depend_on_padding(name: str) -> None:
    model = tiny(router=name, group="sequence").eval()
    longer, mask = ids(), torch.ones(2, 6, dtype=torch.long)
    longer[:, 4:], mask[:, 4:] = 7, 0
    targets = ids(length=3)
    with torch.no_grad():
        padded = model(longer, mask, decoder_input_ids=targets).logits
        alone = model(longer[:, :4], mask[:, :4], decoder_input_ids=targets).logits
    assert torch.allclose(padded, alone, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_a_decoder_takes_causal_routers_only(name: str) -> None:
    causal = routers.build(name, d_model=8, num_experts=4, vocab_size=32).causal
    if causal:
        assert tiny(router=name, allow_noncausal=False).generate(ids(), max_new_tokens=3).shape
    else:
        with pytest.raises(ConfigError, match="not causal, in a decoder.*allow_noncausal"):
            tiny(router=name, allow_noncausal=False)


@pytest.mark.parametrize("name", OURS)
def test_state_dicts_and_configs_round_trip(name: str) -> None:
    model, other = tiny(router=name), tiny(router=name)
    assert moezoo.SwitchConfig.from_json(model.config.to_json()) == model.config
    other.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    "options",
    [
        *({"router": name} for name in OURS),
        *({"experts": name} for name in experts.names()),
        {"shared_expert": {"gated": True}},
        {"router_losses": {"load_balance": {"coefficient": 0.1, "scope": "sequence"}}},
        {"capacity": {"name": "reroute", "factor": 1.0}},
    ],
    ids=str,
)
def test_a_saved_model_comes_back_with_every_component(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(**options)
    with moezoo.record(model) as tape:
        model.train()(ids(), labels=ids())
    tape.adapt()
    moezoo.save(model.eval(), tmp_path / "model")
    back = moezoo.load(tmp_path / "model").eval()
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    assert torch.equal(back(ids(), labels=ids()).logits, model(ids(), labels=ids()).logits)


def test_tape_adapts_every_layer_once() -> None:
    model = tiny(router={"name": "sigmoid_top_k", "bias_rate": 0.5})
    with moezoo.record(model) as tape:
        model.train()(ids(), labels=ids())
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    assert all(layer.router.expert_bias.abs().sum() == 0 for layer in layers)
    tape.adapt()
    for layer in layers:
        assert set(layer.router.expert_bias.abs().tolist()) <= {0.0, 0.5}
        assert layer.router.expert_bias.abs().sum() > 0
