"""Options of a layer are followed, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moezoo
from moezoo.errors import ConfigError
from moezoo.experts import ModuleExperts, StackedExperts

BIASED = {name for name in moezoo.routers.names() if moezoo.routers.registry.takes(name, "bias")}


@pytest.mark.parametrize(
    ("option", "value"),
    [("d_ff", 9), ("activation", "gelu"), ("dropout", 0.0), ("dropout", 0.1)],
)
@pytest.mark.parametrize("kind", ["stacked", "modules"])
def test_options_of_experts_are_refused_beside_an_instance(
    option: str, value: Any, kind: str
) -> None:
    experts: Any = StackedExperts(4, 8, 3)
    if kind == "modules":
        experts = ModuleExperts(4, 3, d_ff=8)
    given: dict[str, Any] = {"d_ff": None, option: value}
    with pytest.raises(moezoo.MoezooError, match=option):
        moezoo.SparseMLP(4, given.pop("d_ff"), 3, experts=experts, **given)
    assert moezoo.SparseMLP(4, None, 3, experts=experts).moe.experts is experts
    shared = moezoo.SparseMLP(4, 5, 3, experts=experts, shared={}, activation="gelu").moe.shared
    assert shared is not None and shared.expert.wi.out_features == 5, "there it is followed"


def test_what_an_instance_is_may_be_said_again() -> None:
    experts = StackedExperts(4, 8, 3, activation="gelu")
    assert moezoo.SparseMLP(4, 8, 3, experts=experts, activation="gelu").moe.experts is experts


@pytest.mark.parametrize("router", moezoo.routers.names())
def test_a_router_bias_is_there_or_refused(router: str) -> None:
    config = moezoo.SwitchConfig(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=2, num_experts=4,
        router=router, router_bias=True, allow_noncausal=True,
    )  # fmt: skip
    if router not in BIASED:
        with pytest.raises(moezoo.MoezooError, match=f"router '{router}' has no bias"):
            moezoo.build(config, device="meta")
        return
    names = moezoo.build(config, device="meta").state_dict()
    assert any(name.endswith("router.classifier.bias") for name in names)


@pytest.mark.parametrize("group", ["batch", 8])
def test_a_group_that_the_policy_cannot_follow_is_refused(group: Any) -> None:
    with pytest.raises(moezoo.MoezooError, match="counts by sequence"):
        moezoo.SparseMLP(4, 8, 3, capacity="transformers", group=group)
    for said in (None, "sequence"):
        layer = moezoo.SparseMLP(4, 8, 3, capacity="transformers", group=said)
        assert layer.moe.group == "sequence"
    assert moezoo.SparseMLP(4, 8, 3).moe.group == "batch"


def test_a_config_says_so_too() -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2}
    config = moezoo.SwitchConfig(**sizes, num_experts=4, group=64, capacity="transformers")
    with pytest.raises(moezoo.MoezooError, match="counts by sequence"):
        moezoo.build(config, device="meta")


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    rows = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
    with pytest.raises(moezoo.MoezooError, match="takes no nested tensor.*Pad it"):
        moezoo.SparseMLP(4, 8, 3)(rows)


def test_components_are_given_in_the_words_of_a_command_line() -> None:
    layer = moezoo.SparseMLP(8, 16, 4, router="top_k:2", capacity="switch:1.5")
    assert layer.moe.router.k == 2 and "1.5" in repr(layer.moe.capacity)
    made = moezoo.sparse(4, router="top_k:k=3")(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    )
    assert made.moe.router.k == 3
    with pytest.raises(ConfigError, match="no option 'kk'"):
        moezoo.SparseMLP(8, 16, 4, router="top_k:kk=2")
    with pytest.raises(ConfigError, match="'k' of router 'top_k' has the wrong type"):
        moezoo.SparseMLP(8, 16, 4, router="top_k:two")
