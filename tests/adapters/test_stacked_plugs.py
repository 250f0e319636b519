"""MLPs of known forms become stacks of experts, and the model computes what it did."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import moezoo
from moezoo import sparse
from moezoo.adapters.mlp_form import form_of
from moezoo.adapters.sparse import PluggedMLP
from moezoo.experts import ModuleExperts, StackedExperts
from moezoo.quantization import relative_error

pytest.importorskip("transformers")
from .plugged_models import MODELS, called, made


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_of_transformers_computes_the_same_with_stacked_experts(name: str) -> None:
    model = made(name)
    expected = called(name, model)
    names = moezoo.plug(model, re.compile(MODELS[name][1]), sparse(4))
    assert relative_error(expected, called(name, model)) <= 1e-6
    layers = [part for part in model.modules() if isinstance(part, PluggedMLP)]
    assert len(layers) == len(names)
    assert all(type(layer.moe.experts) is StackedExperts for layer in layers)
    for layer in layers:
        experts = layer.moe.experts
        for parameter in experts.parameters():
            parameter[1:] = torch.randn_like(
                parameter[1:]
            )  # what the first expert computes is not the others' business
    assert relative_error(expected, called(name, model)) > 1e-3


def gated(cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> type[nn.Module]:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 4)
            self.both = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = cut(self.both(x))
            return self.out(F.silu(gate) * up)

    return Fused


CUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "gate first": lambda h: (h[..., :6], h[..., 6:]),
    "gate last": lambda h: (h[..., 6:], h[..., :6]),
    "even": lambda h: (h[..., ::2], h[..., 1::2]),
    "odd": lambda h: (h[..., 1::2], h[..., ::2]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_fused_gate_is_found_wherever_it_is(cut: str) -> None:
    mlp, x = gated(CUTS[cut])(), torch.randn(5, 4)
    layer: Any = sparse(3, d_model=4)(mlp).eval()
    assert type(layer.moe.experts) is StackedExperts
    torch.testing.assert_close(layer(x), mlp(x))


class Square(nn.Module):
    """Three maps of one shape: only a trial tells which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(x)) * self.a(x))


def test_maps_of_one_shape_are_told_apart_and_a_missing_bias_is_zero() -> None:
    mlp, x = Square(), torch.randn(5, 4)
    layer: Any = sparse(3, d_model=4)(mlp).eval()
    torch.testing.assert_close(layer(x), mlp(x))
    assert not layer.moe.experts.wi_1_bias.any()


class Dropping(nn.Module):
    """Dropout by a module or a function, at a place."""

    def __init__(self, place: str, by: str) -> None:
        super().__init__()
        self.place, self.by, self.p = place, by, 0.25
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.drop = nn.Dropout(0.25 if by == "module" else 0.0)

    def at(self, place: str, x: Tensor) -> Tensor:
        if self.place != place:
            return x
        return self.drop(x) if self.by == "module" else F.dropout(x, self.p, self.training)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.first(self.at("before", x)))
        return self.at("after", self.second(self.at("hidden", h)))


@pytest.mark.parametrize("by", ["module", "function"])
def test_dropout_stays_where_it_is(by: str) -> None:
    hidden, after = form_of(Dropping("hidden", by), 4), form_of(Dropping("after", by), 4)
    assert hidden is not None and (hidden.dropout, hidden.after) == (0.25, 0.0)
    assert after is not None and (after.dropout, after.after) == (0.0, 0.25)
    assert form_of(Dropping("before", by), 4) is None
    layer: Any = sparse(2, capacity="dropless")(Dropping("after", by)).train()
    y = layer(torch.randn(400, 4))
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
    assert isinstance(sparse(2)(Dropping("before", by)).moe.experts, ModuleExperts)


@pytest.mark.parametrize(
    "mlp",
    [
        nn.Sequential(nn.Linear(4, 6), nn.Softsign(), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()),
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 4)),
    ],
    ids=["activation", "norm", "more", "less", "limit"],
)
def test_another_mlp_is_copied_as_it_is(mlp: nn.Module) -> None:
    layer: Any = sparse(3, d_model=4)(mlp).eval()
    assert isinstance(layer.moe.experts, ModuleExperts)
    for x in (torch.randn(5, 4), 100.0 * torch.randn(5, 4)):
        torch.testing.assert_close(layer(x), mlp(x))


def test_an_mlp_that_somebody_observes_is_copied_as_it_is() -> None:
    mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    mlp[0].register_forward_hook(lambda module, args, out: 2.0 * out)
    layer: Any = sparse(3, d_model=4)(mlp).eval()
    assert isinstance(layer.moe.experts, ModuleExperts)


class Doubled(nn.Module):
    """A weight that is twice a parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


@pytest.mark.parametrize(
    "parametrise",
    [
        torch.nn.utils.parametrizations.weight_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    ],
    ids=["weight_norm", "one's own"],
)
def test_a_parametrisation_is_kept(parametrise: Any) -> None:
    mlp, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(5, 4)
    parametrise(mlp[0])
    layer: Any = sparse(3)(mlp).eval()
    assert all(parametrize.is_parametrized(expert[0]) for expert in layer.moe.experts.each)
    torch.testing.assert_close(layer(x), mlp(x))


class Levelled(nn.Sequential):
    """An MLP with a factor that is 1 until a file says otherwise."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.level * super().forward(x)


def test_a_buffer_is_kept() -> None:
    layer: Any = sparse(3)(Levelled())
    assert [tuple(buffer.shape) for buffer in layer.moe.experts.buffers()] == [()] * 3


class Added(nn.Module):
    """What a second argument is for."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.factor = factor

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.mlp(x) + self.factor * residual


def test_a_second_argument_is_added_or_refused() -> None:
    x, residual, mlp = torch.randn(5, 4), torch.randn(5, 4), Added(1.0)
    layer: Any = sparse(3, d_model=4)(mlp).eval()
    torch.testing.assert_close(layer(x, residual), mlp(x, residual))
    with pytest.raises(moezoo.MoezooError, match="does more with its second argument"):
        sparse(3)(Added(2.0))


@torch.no_grad()
def test_stacked_experts_with_biases_are_rounded_to_eight_bits() -> None:
    model = made("GPT2", torch.float32)
    expected = called("GPT2", model)
    moezoo.plug(model, "h.*.mlp", sparse(4, causal=True))
    done = moezoo.quantize(model)
    assert "h.0.mlp.moe.experts" in done.quantized
    assert relative_error(expected, called("GPT2", model)) < 0.05
