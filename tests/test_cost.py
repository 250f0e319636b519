"""What a model costs is what its modules hold, for every component of the registries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from moezoo import cli
from moezoo.assemble import make_moe
from moezoo.cost import cost, layer_cost
from tests.models.tiny import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 3,
    "num_experts": 4, "allow_noncausal": True,
}  # fmt: skip


def ours(registry: Any) -> list[str]:
    return [n for n in registry.names() if registry.get(n).__module__.startswith("moezoo.")]


SPECS: list[dict[str, Any]] = [
    *({"router": name} for name in ours(moezoo.routers.registry)),
    *({"experts": name} for name in ours(moezoo.experts.registry)),
    {"experts": {"name": "lora", "rank": 2}, "feed_forward_proj": "gated-gelu", "d_ff": 4},
    {"experts": {"name": "modules", "sizes": [2, 4, 8, 16]}},
    {"experts": {"name": "stacked", "d_ff": 6}, "router": {"name": "top_k", "k": 4}},
    {"experts": {"name": "zero", "experts": "lora", "zero": 1, "copy": 0, "constant": 1}},
    {"shared_expert": {"d_ff": 10, "gated": True}, "router": {"name": "gshard"}},
    {"router": {"name": "switch", "bias": True}, "tie_word_embeddings": False},
    {"router": {"name": "relu", "bias": True}, "router_bias": True},
]


@pytest.mark.parametrize("task", ["conditional_generation", "model", "encoder"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_parameter_is_counted_where_it_lies(spec: dict[str, Any], task: str) -> None:
    config = moezoo.SwitchConfig(**{**SIZES, **spec})
    model = moezoo.build(config, task=task, device="meta")
    found = cost(config, task=task)
    layers = [m for m in model.modules() if isinstance(m, moezoo.MoE)]
    assert layers

    def held(modules: list[torch.nn.Module]) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert found.parameters == held([model])
    assert found.expert_parameters == held([layer.experts for layer in layers])
    assert found.router_parameters == held([layer.router for layer in layers])
    router = layers[0].router
    assert found.bounds_load == (router.soft or router.owns_capacity)
    layer = layer_cost(config)
    assert len(layer.experts) == config.num_experts
    if router.choices and not router.soft:
        assert layer.choices == min(router.choices, config.num_experts)


@pytest.mark.parametrize("router", ours(moezoo.routers.registry))
def test_a_token_meets_as_many_experts_as_are_counted(router: str) -> None:
    config = moezoo.SwitchConfig(**{**SIZES, "router": router, "capacity": "dropless"})
    torch.manual_seed(0)
    layer = make_moe(config, decoder=False).eval()
    if layer.router.owns_capacity or layer.router.soft or not layer.router.choices:
        pytest.skip("how many experts a token meets depends on the others")
    out, _ = layer(torch.randn(1, 1, 16), token_ids=torch.zeros(1, 1, dtype=torch.int64))
    out.sum().backward()
    met = int((layer.experts.wo.grad.abs().sum((1, 2)) > 0).sum())
    found = layer_cost(config)
    assert met == found.choices
    held = sum(p.numel() for p in layer.parameters())
    assert found.active == held - (config.num_experts - met) * found.experts[0]


@pytest.mark.parametrize(
    ("router", "init", "met"),
    [("switch", "copy", 1), ("gshard", "copy", 2), ("top_k:3", "copy", 3),
     ("top_k:2", "virtual_group:2", 2)],
)  # fmt: skip
def test_plan_counts_what_a_token_meets(
    router: str, init: str, met: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moezoo.save(tiny(num_experts=0), tmp_path / "t5")
    arguments = ["plan", str(tmp_path / "t5"), "--experts", "4", "--router", router, "--json"]
    assert cli.main([*arguments, "--init", init, "--preserve", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    width = 12 if init == "virtual_group:2" else 24
    spare = 2 * (4 - met) * 2 * 16 * width  # two sparse layers, two matrices
    assert found["parameters"] - found["active_parameters"] == spare
