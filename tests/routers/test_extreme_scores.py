"""Gradients are finite wherever outputs are, whatever the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moezoo import routers
from moezoo.functional.losses import importance, load_balance, z_loss
from moezoo.records import Routing, SoftAssignment, Tokens
from moezoo.routers import Router
from tests.routers.batches import VOCABULARY, WIDTH
from tests.routers.test_every_router import NAMES

EXPERTS = 5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPECS: list[Any] = [
    *NAMES,
    {"name": "switch", "weight": "unit"},
    {"name": "noisy_top_k", "k": 1},
    {"name": "noisy_top_k", "k": 4},
    {"name": "top_k", "softmax": "after"},
    {"name": "top_k", "normalize": "none"},
    {"name": "top_k", "normalize": "after"},
    {"name": "sigmoid_top_k", "score": "sqrt_softplus"},
]
# A unit weight's gradient is not that of its value, which is constant.
GRADUAL = [s for s in SPECS if s not in ("hash", "random", {"name": "switch", "weight": "unit"})]


def build(spec: Any, *, scale: float, closed: int, seed: int, dtype: torch.dtype) -> Router:
    """A router of scores about `scale`; by their bias the first `closed` experts get -infinity."""
    name = spec if isinstance(spec, str) else spec["name"]
    sizes = {"d_model": WIDTH, "num_experts": EXPERTS, "vocab_size": VOCABULARY}
    if "bias" in routers.registry.get(name).__init__.__annotations__:
        sizes["bias"] = True
    router = routers.build(spec, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        classifier = getattr(router, "classifier", None)
        if closed and getattr(classifier, "bias", None) is not None:
            classifier.bias[:closed] = float("-inf")
    return router.to(dtype)


def outputs(routing: Routing, router: Router) -> list[Tensor]:
    """What reaches a model's loss: weights, the router's own losses and those of the package."""
    a = routing.assignment
    if isinstance(a, SoftAssignment):
        return [a.dispatch.square().sum(), a.combine.square().sum()]
    found = [(a.weight * torch.arange(1, a.num_pairs + 1)).sum(), *routing.losses.values()]
    found.append(importance(a))
    if routing.probs is not None:
        found.append(load_balance(routing.probs, a))
    if routing.logits is not None and router.has_logits:
        found.append(z_loss(routing.logits))
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(
    scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 30.0, 1e3, 1e6, 1e15]),
    closed=st.integers(0, EXPERTS - 1),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
)
def test_gradients_are_finite_wherever_outputs_are(
    spec: Any, scale: float, closed: int, seed: int, dtype: torch.dtype, training: bool
) -> None:
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    router = build(spec, scale=scale, closed=closed, seed=seed, dtype=dtype).train(training)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, WIDTH, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(VOCABULARY, (6,), generator=generator)
    torch.manual_seed(seed)
    found = outputs(router(Tokens(x, ids)), router)
    wants = [x, *(p for p in router.parameters() if p.requires_grad)]
    for number, output in enumerate(found):
        if not output.requires_grad or not bool(output.isfinite()):
            continue
        grads = torch.autograd.grad(output, wants, retain_graph=True, allow_unused=True)
        for grad in grads:
            assert grad is None or not bool(grad.isnan().any()), f"output {number}"
            infinite = grad is not None and bool(grad.isinf().any())
            assert not infinite or scale > 1e3 or dtype == torch.float16, f"output {number}"


def test_a_unit_weight_teaches_though_the_others_underflow() -> None:
    router = build({"name": "switch", "weight": "unit"}, scale=1.0, closed=0, seed=0,
                   dtype=torch.float32)  # fmt: skip
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 1e3):
        scores = (router.classifier.weight * size).detach().requires_grad_()
        with torch.no_grad():
            router.classifier.weight.copy_(scores)
        router.zero_grad()
        weight = router(Tokens(x)).assignment.weight
        assert torch.equal(weight, torch.ones(4))
        weight.sum().backward()
        logits = x @ scores.T + router.classifier.bias.detach()
        logits.log_softmax(-1).max(-1).values.sum().backward()
        assert torch.allclose(router.classifier.weight.grad, scores.grad, atol=1e-5)


@pytest.mark.parametrize("spec", GRADUAL, ids=str)
def test_gradients_are_right_beside_closed_experts(spec: Any) -> None:
    router = build(spec, scale=0.5, closed=2, seed=3, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(VOCABULARY, (4,), generator=generator)

    def losses(x: Tensor) -> tuple[Tensor, ...]:
        routing = router(Tokens(x, ids))
        return tuple(o for o in outputs(routing, router) if o.requires_grad)

    assert torch.autograd.gradcheck(losses, (x,), nondet_tol=1e-12)
