"""The conformance kit on a few components, short enough to be run against every seeded bug."""

from __future__ import annotations

import pytest
import torch

from moezoo.functional.assign import token_choice
from moezoo.records import Tokens
from moezoo.testing import check_experts, check_loss, check_policy, check_router

ROUTERS = [
    {"name": "switch", "jitter": 0.2},
    "switch",
    "top_k",
    "soft",
    "expert_choice",
    "sigmoid_top_k",
]


@pytest.mark.parametrize("spec", ROUTERS, ids=str)
def test_routers_keep_their_promises(spec: str | dict[str, object]) -> None:
    check_router(spec, examples=12)


@pytest.mark.parametrize("name", ["first_come", "batch_priority", "reroute", "switch"])
def test_policies_keep_their_promises(name: str) -> None:
    check_policy(name, examples=12)


@pytest.mark.parametrize("name", ["load_balance", "z", "importance"])
def test_losses_keep_their_promises(name: str) -> None:
    check_loss(name, examples=12)


@pytest.mark.parametrize("name", ["stacked", "modules"])
def test_containers_keep_their_promises(name: str) -> None:
    check_experts(name, examples=12)


def test_nan_in_padding_reaches_no_weight() -> None:
    real = torch.tensor([True, False, True])
    gate = torch.tensor([[0.7, 0.3], [float("nan"), float("nan")], [0.4, 0.6]])
    tokens = Tokens(torch.zeros(3, 4), real=real)
    a = token_choice(torch.nan_to_num(gate), gate, 1, tokens)
    assert torch.equal(a.weight, torch.tensor([0.7, 0.0, 0.6]))
