"""Every router on every backend of the grouped product: a layer equals the plain loop, with its
gradients. `test_graphs.py` compiles and exports the same pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moezoo
from moezoo import routers
from moezoo.functional import grouped_mlp as fused
from moezoo.layer import MoE
from moezoo.ops import backends
from moezoo.ops.backends import Choice
from moezoo.records import Routing, SoftAssignment
from tests.ops.rows import cpu_backends

NAMES = [n for n in routers.names() if routers.registry.get(n).__module__.startswith("moezoo.")]
EXAMPLES = max(8, settings().max_examples // 8)
IDS = 16
every_router = pytest.mark.parametrize("name", NAMES)
every_backend = pytest.mark.parametrize("backend", cpu_backends())


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Experts as grouped products on one backend, never as the fused path of the CPU. What a
    backend refuses (no rows, for one) goes to the loop, as in the table.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_fuses", lambda *_: False)
        patch.setattr(backends, "TABLE", (Choice(backend), Choice("loop")))
        yield


def layer(name: str, *, width: int = 8, hidden: int = 8, experts: int = 3, seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    sparse = moezoo.SparseMLP(
        width, hidden, experts, router=name, activation="gelu", vocab_size=IDS
    )
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.normal_(std=0.5)
    return sparse.moe.eval()


def outputs(moe: MoE, x: Tensor) -> tuple[Tensor, Routing]:
    ids = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % IDS
    torch.manual_seed(1)  # the random router draws in evaluation too
    y, routing = moe(x, token_ids=ids)
    return y, routing


def looped(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """y (T, D) as the law says: expert by expert for a token, or slot by slot."""
    wi, wo = moe.experts.wi, moe.experts.wo
    x_TD, a = x.reshape(-1, x.shape[-1]), routing.assignment

    def expert(row: Tensor, e: int) -> Tensor:
        return torch.nn.functional.gelu(row @ wi[e].t()) @ wo[e].t()

    if isinstance(a, SoftAssignment):
        (dispatch,), (combine,) = a.dispatch, a.combine  # one group: the batch
        terms = (
            combine[:, e, p, None] * expert(dispatch[:, e, p] @ x_TD, e)
            for e in range(dispatch.shape[1])
            for p in range(dispatch.shape[2])
        )
        return sum(terms, torch.zeros_like(x_TD))
    rows = [torch.zeros_like(x_TD[0]) for _ in x_TD]
    pairs = zip(a.token.tolist(), a.expert.tolist(), a.weight, a.kept.tolist(), strict=True)
    for token, e, weight, kept in pairs:
        if kept:
            rows[token] = rows[token] + weight * expert(x_TD[token], e)
    return torch.stack(rows)


@every_backend
@every_router
@settings(max_examples=EXAMPLES)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    width=st.sampled_from([4, 8, 12]),
    hidden=st.sampled_from([4, 16]),
    experts=st.integers(2, 5),
    seed=st.integers(0, 2**31),
)
def test_a_layer_equals_the_plain_loop_on_any_shape(
    name: str,
    backend: str,
    shape: tuple[int, int],
    width: int,
    hidden: int,
    experts: int,
    seed: int,
) -> None:
    moe = layer(name, width=width, hidden=hidden, experts=experts, seed=seed)
    inputs = [torch.randn(*shape, width).requires_grad_(), moe.experts.wi, moe.experts.wo]
    with running_on(backend):
        y, routing = outputs(moe, inputs[0])
        found = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    _, again = outputs(moe, inputs[0])
    expected = looped(moe, inputs[0], again)
    if not expected.requires_grad:  # nobody chose an expert
        expected = expected + 0.0 * sum(tensor.sum() for tensor in inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(y.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", [b for b in cpu_backends() if b in ("loop", "padded")])
@every_router
def test_gradients_of_a_layer_are_right_in_float64(name: str, backend: str) -> None:
    # `grouped` takes no float64: the test above holds its gradients to the loop's.
    moe = layer(name).double()

    def compute(x: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
        weights = {"experts.wi": wi, "experts.wo": wo}
        ids = torch.arange(5)[None] % IDS
        torch.manual_seed(1)
        y, _ = torch.func.functional_call(moe, weights, (x,), {"token_ids": ids})
        return y

    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    inputs = (x, moe.experts.wi.detach().requires_grad_(), moe.experts.wo.detach().requires_grad_())
    with running_on(backend):
        assert torch.autograd.gradcheck(compute, inputs, fast_mode=True)
