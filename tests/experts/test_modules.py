"""Any modules as experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moezoo
from moezoo import experts
from moezoo.errors import ConfigError, ShapeError
from moezoo.experts import ModuleExperts


def test_each_module_maps_its_own_rows() -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(4, 4), nn.Identity(), nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4))]
    container = ModuleExperts(4, 3, modules=modules)
    rows = torch.randn(8, 4)
    out = container(rows, torch.tensor([2, 3, 1]))
    assert torch.equal(out[:2], modules[0](rows[:2]))
    assert torch.equal(out[2:5], rows[2:5])
    assert torch.equal(out[5:6], modules[2](rows[5:6]))
    assert out[6:].abs().sum() == 0


def test_an_expert_without_rows_gets_a_zero_gradient() -> None:
    container = ModuleExperts(4, 2, modules=[nn.Linear(4, 4), nn.Linear(4, 4)])
    container(torch.randn(3, 4), torch.tensor([3, 0])).sum().backward()
    assert all(p.grad is not None for p in container.parameters())
    assert container.expert(1).weight.grad.abs().sum() == 0


def test_sizes_make_feed_forwards_of_different_widths() -> None:
    container = experts.build({"name": "modules", "sizes": [3, 5]}, d_model=4, num_experts=2)
    shapes = {name: tuple(p.shape) for name, p in container.named_parameters()}
    assert shapes["each.0.wi.weight"] == (3, 4)
    assert shapes["each.1.wi.weight"] == (5, 4)


def test_equal_modules_compute_what_stacked_experts_compute() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 4, "d_ff": 6, "num_experts": 3, "activation": "gated-gelu"}
    stacked, single = experts.build("stacked", **sizes), experts.build("modules", **sizes)
    for index in range(3):
        for name in ("wi_0", "wi_1", "wo"):
            weight = single.get_parameter(f"each.{index}.{name}.weight")
            weight.data.copy_(stacked.get_parameter(name)[index])
    rows, counts = torch.randn(9, 4), torch.tensor([4, 0, 3])
    assert torch.allclose(single(rows, counts), stacked(rows, counts), atol=1e-6)


def test_a_mixed_layer_trains() -> None:
    modules = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False)]
    layer = moezoo.SparseMLP(4, None, 3, experts=ModuleExperts(4, 3, modules=modules))
    layer(torch.randn(2, 5, 4)).square().sum().backward()
    assert modules[0].weight.grad is not None


def test_a_module_that_changes_the_width_is_named() -> None:
    container = ModuleExperts(4, 2, modules=[nn.Identity(), nn.Linear(4, 5)])
    with pytest.raises(ShapeError, match="expert 1 changed the shape"):
        container(torch.randn(2, 4), torch.tensor([1, 1]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"modules": [nn.Identity()]}, "not one module per expert"),
        ({"sizes": [3]}, "not one size per expert"),
        ({"sizes": [3, 0]}, "bad d_ff"),
        ({}, "needs experts, or sizes"),
        ({"modules": [nn.Identity()] * 2, "sizes": [1, 1]}, "exclude each other"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ModuleExperts(4, 2, **options)
