"""The streamed router is `switch`: same pairs, weights, losses and gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.errors import RoutingError
from moezoo.functional import streamed
from moezoo.losses import LoadBalanceLoss, ZLoss
from moezoo.records import Tokens
from moezoo.routers import StreamedSwitchRouter, SwitchRouter
from tests.routers.batches import WIDTH, batch


def pair(dtype: torch.dtype, **options: bool) -> tuple[SwitchRouter, StreamedSwitchRouter]:
    torch.manual_seed(0)
    switch = SwitchRouter(WIDTH, 5, **options).to(dtype)
    twin = StreamedSwitchRouter(WIDTH, 5, **options).to(dtype)
    with torch.no_grad():
        for parameter in switch.parameters():
            parameter.normal_()
    twin.load_state_dict(switch.state_dict())
    return switch, twin


def summed(router: torch.nn.Module, tokens: Tokens) -> tuple[Tensor, ...]:
    """Weights, both losses and all gradients."""
    routing = router(tokens)
    balance, z = LoadBalanceLoss()(routing), ZLoss()(routing)
    weight = routing.assignment.weight
    slope = torch.linspace(1, 2, weight.numel(), dtype=weight.dtype)
    total = (weight * slope).sum() + 3 * balance + 5 * z
    inputs = [tokens.x, *router.parameters()]
    grads = torch.autograd.grad(total, inputs)
    expert = torch.where(routing.assignment.kept, routing.assignment.expert, -1)
    return expert, weight, balance, z, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_it_equals_switch_over_many_chunks(
    dtype: torch.dtype, bias: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_SCORES", 1)  # chunks of 16 tokens
    switch, twin = pair(dtype, bias=bias)
    tokens = batch(40, padded=padded, dtype=dtype)
    tokens.x.requires_grad_()
    for ours, theirs in zip(summed(twin, tokens), summed(switch, tokens), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    router, x = StreamedSwitchRouter(8, 2048), torch.randn(2048, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        router(Tokens(x))
    assert sum(kept) < 2048 * 64


def test_a_model_trains_with_its_own_losses() -> None:
    config = moezoo.SwitchConfig(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=2, num_experts=4
    )
    losses = []
    for name in ("switch", "streamed_switch"):
        model = moezoo.build(config.replace(router=name, router_losses={"z": 0.1}), seed=0).eval()
        ids = torch.arange(12).view(2, 6)
        out = model(ids, labels=ids)
        out.loss.backward()
        assert model.encoder.blocks[1].mlp.router.classifier.weight.grad.any()
        losses.append(out.loss)
    torch.testing.assert_close(*losses)


def test_a_loss_over_sequences_says_why_it_cannot() -> None:
    routing = StreamedSwitchRouter(WIDTH, 4)(batch(8))
    with pytest.raises(RoutingError, match="needs probabilities.*switch"):
        LoadBalanceLoss(scope="sequence")(routing)
