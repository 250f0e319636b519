"""Expert choice: every expert takes its C best tokens of each group."""

from __future__ import annotations

import math

import pytest
import torch

from moezoo.errors import ConfigError
from moezoo.records import Tokens
from tests.routers.batches import WIDTH, batch, make, pairs, sparse


def test_expert_choice_equals_a_loop_with_groups_and_padding() -> None:
    tokens = batch(24, group_size=8, padded=True)
    router = make("expert_choice", factor=1.5)
    assert tokens.real is not None
    probs = (tokens.x @ router.classifier.weight.T).softmax(-1)
    wanted = []
    for start in range(0, 24, 8):
        members = [t for t in range(start, start + 8) if tokens.real[t]]
        share = min(math.ceil(1.5 * len(members) / 4), len(members))
        for e in range(4):
            best = sorted(members, key=lambda t: (-probs[t, e].item(), t))[:share]
            wanted += [(t, e) for t in best]
    assert pairs(router(tokens)) == wanted


def test_every_expert_takes_exactly_its_share() -> None:
    load = torch.bincount(sparse(make("expert_choice", factor=2.0)(batch(16))).expert)
    assert load.tolist() == [8] * 4


def test_share_never_exceeds_the_tokens() -> None:
    assert len(pairs(make("expert_choice", factor=9.0)(batch(5)))) == 20


def test_ties_go_to_the_earlier_token() -> None:
    tokens = Tokens(torch.ones(10, WIDTH))
    kept = pairs(make("expert_choice", 2, factor=0.6)(tokens))
    assert kept == [(t, e) for e in range(2) for t in range(3)]


def test_padding_never_takes_a_place_of_a_real_token() -> None:
    tokens = batch(12)
    alone = make("expert_choice")(tokens)
    filled = Tokens(
        torch.cat([tokens.x, 100 * torch.ones(4, WIDTH)]),
        real=torch.tensor([True] * 12 + [False] * 4),
    )
    padded = make("expert_choice")(filled)
    assert pairs(padded) == pairs(alone)
    assert torch.equal(sparse(padded).weight[sparse(padded).kept], sparse(alone).weight)


def test_evaluation_has_its_own_factor() -> None:
    router = make("expert_choice", factor=1.0, eval_factor=2.0)
    assert len(pairs(router.train()(batch(8)))) == 8
    assert len(pairs(router.eval()(batch(8)))) == 16


def test_float64_takes_the_same_tokens_as_float32() -> None:
    router = make("expert_choice")
    narrow = pairs(router(batch(40)))
    wide = batch(40)
    assert pairs(router.double()(Tokens(wide.x.double()))) == narrow


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_factors_are_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="factor is out of range"):
        make("expert_choice", factor=factor)
