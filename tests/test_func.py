"""`torch.func.grad` differentiates layers as `backward` does, and a second time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

import moezoo
from moezoo.layer import MoE

SIZES = {"d_model": 6, "num_experts": 3}


def layer(router: str, container: str = "stacked") -> MoE:
    torch.manual_seed(0)
    built = moezoo.routers.build(router, **SIZES, vocab_size=24)
    experts = moezoo.experts.build(container, d_ff=8, **SIZES)
    made = MoE(built, experts, capacity=moezoo.capacity.build("dropless")).double()
    return made.eval()


def loss_of(made: MoE, ids: Tensor | None, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    y, _ = functional_call(made, parameters, (x,), {"token_ids": ids})
    return y.square().sum()


def agrees(made: MoE) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    ids = torch.arange(5) if made.router.needs_token_ids else None
    parameters = {name: value.detach() for name, value in made.named_parameters()}
    found, found_x = grad(lambda p, x: loss_of(made, ids, p, x), argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    y, _ = made(leaf, token_ids=ids)
    y.square().sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(found_x, leaf.grad)
    for name, parameter in made.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, msg=name)


@pytest.mark.parametrize("router", moezoo.routers.names())
def test_a_functional_gradient_is_that_of_backward_for_every_router(router: str) -> None:
    agrees(layer(router))


@pytest.mark.parametrize("container", moezoo.experts.names())
def test_a_functional_gradient_is_that_of_backward_for_every_container(container: str) -> None:
    agrees(layer("switch", container))


def test_a_functional_gradient_can_be_differentiated_again() -> None:
    made = layer("top_k")
    x = torch.randn(2, 6, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in made.named_parameters()}

    def first(x: Tensor) -> Tensor:
        found: Tensor = grad(lambda x: loss_of(made, None, parameters, x))(x)
        return found

    def directional(x: Tensor) -> Tensor:
        return first(x)[0, 0]

    second = grad(directional)(x)
    step = torch.zeros_like(x)
    step[1, 2] = step[0, 3] = 1e-6
    difference = (directional(x + step) - directional(x - step)) / 2e-6
    torch.testing.assert_close((second * step).sum() / 1e-6, difference, rtol=1e-5, atol=1e-7)


def test_models_take_functional_gradients() -> None:
    config = moezoo.SwitchConfig(
        vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=2, num_experts=2
    )
    model = moezoo.build(config, seed=0).double().eval()
    ids = torch.randint(2, 30, (2, 5))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, parameters, (ids,), {"labels": ids}).loss
        return found

    found = grad(loss)(parameters)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
