"""GShard: two best experts, renormalised before dropping; what becomes of the second."""

from __future__ import annotations

import pytest
import torch

from moezoo.errors import ConfigError
from tests.routers.batches import batch, make, pairs, sparse


def test_gshard_equals_a_loop() -> None:
    tokens = batch(9, padded=True)
    router = make("gshard", second="threshold", threshold=0.3)
    assert tokens.real is not None
    first, second = [], []
    for t, row in enumerate((tokens.x @ router.classifier.weight.T).softmax(-1).tolist()):
        a, b = sorted(range(4), key=lambda e: (-row[e], e))[:2]
        share = row[b] / (row[a] + row[b])
        if tokens.real[t]:
            first.append((t, a, 1 - share))
            second += [(t, b, share)] if share > 0.3 else []
    got = sparse(router(tokens))
    assert pairs(router(tokens)) == [(t, e) for t, e, _ in first + second]
    wanted = torch.tensor([weight for *_, weight in first + second])
    assert torch.allclose(got.weight[got.kept], wanted, atol=1e-6)


def test_first_choices_come_before_all_second_ones() -> None:
    assignment = sparse(make("gshard", second="all")(batch(5)))
    assert assignment.token.tolist() == [0, 1, 2, 3, 4] * 2


def test_second_none_keeps_one_expert_per_token() -> None:
    routing = make("gshard", second="none")(batch(7))
    assert [t for t, _ in pairs(routing)] == list(range(7))
    assert (sparse(routing).weight[:7] < 1).all()  # renormalised before the second is dropped


def test_random_second_expert_is_taken_with_probability_twice_its_weight() -> None:
    tokens = batch(1)
    router = make("gshard", second="random")
    with torch.no_grad():
        router.classifier.weight.mul_(0.5)
    share = sparse(router.eval()(tokens)).weight[1].item()
    taken = sum(len(pairs(router.train()(tokens))) - 1 for _ in range(2000)) / 2000
    assert abs(taken - min(1.0, 2 * share)) < 0.04


def test_random_second_expert_is_always_taken_in_evaluation() -> None:
    assert len(pairs(make("gshard").eval()(batch(20)))) == 40


def test_one_expert_leaves_one_choice() -> None:
    assert make("gshard", 1).choices == 1


def test_unknown_second_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="option 'second'.*'all' or 'none'"):
        make("gshard", second="most")
