"""Soft MoE: dispatch sums to 1 over tokens, combine over slots."""

from __future__ import annotations

import torch

from moezoo.records import SoftAssignment, Tokens
from tests.routers.batches import WIDTH, batch, make


def soft(tokens: Tokens, **options: object) -> SoftAssignment:
    assignment = make("soft", **options)(tokens).assignment
    assert isinstance(assignment, SoftAssignment)
    return assignment.check(tokens.real)


def test_soft_equals_a_loop_over_groups() -> None:
    tokens = batch(12, group_size=4, padded=True)
    assert tokens.real is not None
    router = make("soft", slots=2)
    assignment = soft(tokens, slots=2)
    rows = tokens.x / tokens.x.norm(dim=-1, keepdim=True)
    columns = router.scale * router.phi / router.phi.norm(dim=-1, keepdim=True)
    for group in range(3):
        members = [t for t in range(4 * group, 4 * group + 4) if tokens.real[t]]
        logits = rows[members] @ columns.T
        places = [t - 4 * group for t in members]
        got_in = assignment.dispatch[group, places].flatten(1)
        got_out = assignment.combine[group, places].flatten(1)
        assert torch.allclose(got_in, logits.softmax(0), atol=1e-6)
        assert torch.allclose(got_out, logits.softmax(1), atol=1e-6)


def test_permuting_tokens_permutes_rows() -> None:
    tokens, order = batch(10), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    straight, turned = soft(tokens), soft(Tokens(tokens.x[order]))
    assert torch.allclose(straight.combine[:, order], turned.combine, atol=1e-6)
    assert torch.allclose(straight.dispatch[:, order], turned.dispatch, atol=1e-6)


def test_a_group_of_padding_sums_to_zero() -> None:
    tokens = Tokens(torch.randn(4, WIDTH), real=torch.tensor([True, True, False, False]))
    grouped = Tokens(tokens.x, real=tokens.real, group_size=2)
    assert soft(grouped).dispatch[1].abs().sum() == 0


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(3, WIDTH, requires_grad=True)
    assignment = make("soft")(Tokens(x)).assignment
    assignment.dispatch.square().sum().backward()
    assert torch.isfinite(x.grad).all()
