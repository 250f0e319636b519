"""Sigmoid gating: the balancing bias chooses and never weighs; groups; rebalancing."""

from __future__ import annotations

import pytest
import torch

from moezoo.errors import ConfigError, ShapeError
from moezoo.routers.sigmoid_top_k import SigmoidTopKRouter
from tests.routers.batches import batch, make, pairs, sparse


def sigmoid_router(num_experts: int = 8, **options: object) -> SigmoidTopKRouter:
    router = make("sigmoid_top_k", num_experts, **options)
    assert isinstance(router, SigmoidTopKRouter)
    return router


def test_sigmoid_top_k_with_bias_and_groups_equals_a_loop() -> None:
    tokens = batch(9)
    router = sigmoid_router(k=3, groups=4, groups_per_token=2, scale=2.5)
    router.expert_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    wanted = []
    for t, row in enumerate((tokens.x @ router.classifier.weight.T).sigmoid().tolist()):
        choice = [row[e] + router.expert_bias[e].item() for e in range(8)]
        by_group = sorted(range(4), key=lambda g: -(choice[2 * g] + choice[2 * g + 1]))
        inside = [e for e in range(8) if e // 2 in by_group[:2]]
        best = sorted(inside, key=lambda e: -choice[e])[:3]
        total = sum(row[e] for e in best)
        wanted += [(rank, t, e, 2.5 * row[e] / total) for rank, e in enumerate(best)]
    wanted.sort()
    routing = router(tokens)
    assert pairs(routing) == [(t, e) for _, t, e, _ in wanted]
    assert torch.allclose(sparse(routing).weight, torch.tensor([w for *_, w in wanted]), atol=1e-5)


def test_bias_never_changes_the_weights_of_a_given_selection() -> None:
    tokens, router = batch(30), sigmoid_router(k=2)
    plain = sparse(router(tokens))
    router.expert_bias.copy_(1e-4 * torch.randn(8))
    biased = sparse(router(tokens))
    assert torch.equal(plain.expert, biased.expert)
    assert torch.equal(plain.weight, biased.weight)


def test_shifting_the_bias_by_a_constant_changes_nothing() -> None:
    tokens, router = batch(30), sigmoid_router(k=2, groups=4, groups_per_token=2)
    before = pairs(router(tokens))
    router.expert_bias += 0.5
    assert pairs(router(tokens)) == before


def test_bias_has_no_gradient_and_is_saved() -> None:
    router = sigmoid_router()
    sparse(router(batch(5))).weight.sum().backward()
    assert not router.expert_bias.requires_grad
    assert "expert_bias" in router.state_dict()


def test_rebalance_lowers_overloaded_experts_and_raises_idle_ones() -> None:
    router = sigmoid_router(4, bias_rate=0.01)
    router.rebalance(torch.tensor([10, 2, 4, 0]))
    assert torch.allclose(router.expert_bias, torch.tensor([-0.01, 0.01, 0.0, 0.01]))


def test_adapting_balances_a_skewed_router() -> None:
    tokens, router = batch(512), sigmoid_router(k=2, bias_rate=0.01)

    def max_violation() -> float:
        load = torch.bincount(sparse(router(tokens)).expert, minlength=8).float()
        return (load.max() / load.mean() - 1).item()

    before = max_violation()
    for _ in range(200):
        router.adapt([router(tokens)])
    assert before > 0.3
    assert max_violation() < 0.1


def test_rebalance_refuses_counts_of_another_shape() -> None:
    with pytest.raises(ShapeError, match="counts do not fit"):
        sigmoid_router(4).rebalance(torch.zeros(3))


def test_bias_stays_float32_in_a_bfloat16_model() -> None:
    router = sigmoid_router(4, bias_rate=0.001)
    router.expert_bias += 0.5
    router.bfloat16()
    router.rebalance(torch.tensor([1, 0, 0, 0]))
    assert router.expert_bias[0].item() == pytest.approx(0.499)


def test_sqrt_softplus_scores_equal_the_formula_and_survive_underflow() -> None:
    tokens, router = batch(6), sigmoid_router(4, k=2, score="sqrt_softplus", normalize=False)
    score = torch.nn.functional.softplus(tokens.x @ router.classifier.weight.T).sqrt()
    wanted = score.topk(2).values
    assert torch.allclose(sparse(router(tokens)).weight.view(2, 6).T, wanted, atol=1e-6)
    router.normalize = True
    with torch.no_grad():
        router.classifier.weight.fill_(-1e4)
    low = sparse(router(type(tokens)(tokens.x.abs()))).weight
    assert torch.isfinite(low).all()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"groups": 3}, "groups"),
        ({"k": 5, "groups": 4, "groups_per_token": 2}, "groups_per_token"),
        ({"scale": 0.0}, "scale"),
        ({"bias_rate": -1.0}, "bias_rate"),
        ({"k": 9}, "k"),
        ({"score": "tanh"}, "score"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sigmoid_router(8, **options)
    assert caught.value.field == field
