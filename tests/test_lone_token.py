"""A layer takes a short way for one token to decode; it leads to the same place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moezoo
from moezoo.experts import StackedExperts
from moezoo.layer import MoE
from moezoo.records import Tokens
from moezoo.routers import SwitchRouter

ROUTERS = ("switch", "top_k", "hash", "gshard", "sigmoid_top_k", "relu", "noisy_top_k", "cosine")
EXPERTS = ("stacked", "modules", "zero", "lora")


def layer(router: str = "switch", experts: str = "stacked", activation: str = "relu") -> MoE:
    torch.manual_seed(0)
    made = moezoo.SparseMLP(
        8, 12, 4, router=router, experts=experts, activation=activation, vocab_size=9
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "classifier" not in name:
                parameter.normal_()
    return made.moe.eval()


@given(
    router=st.sampled_from(ROUTERS),
    experts=st.sampled_from(EXPERTS),
    activation=st.sampled_from(["relu", "gated-gelu"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    real=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_token_comes_out_as_with_a_gradient(
    router: str, experts: str, activation: str, dtype: torch.dtype, real: bool, seed: int
) -> None:
    moe = layer(router, experts, activation).to(dtype)
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    arguments = {"mask": torch.tensor([[real]]), "token_ids": torch.tensor([[seed % 9]])}
    expected, wanted = moe(x, **arguments)
    with torch.no_grad():
        found, routing = moe(x, **arguments)
    torch.testing.assert_close(
        found,
        expected.detach(),
        atol=2e-2 if dtype.itemsize == 2 else 1e-5,
        rtol=1e-2 if dtype.itemsize == 2 else 1e-5,
    )
    assert torch.equal(routing.assignment.kept, wanted.assignment.kept)
    assert torch.equal(routing.assignment.expert, wanted.assignment.expert)
    assert real or not found.any()


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@torch.no_grad()
def test_rounded_experts_take_it_too(activation: str) -> None:
    moe = layer(activation=activation)
    moezoo.quantize(moe)
    x = torch.randn(5, 8)
    together, _ = moe(x)
    torch.testing.assert_close(torch.cat([moe(row[None])[0] for row in x]), together)


@torch.no_grad()
def test_hooks_and_forwards_of_others_are_not_passed_by() -> None:
    class Doubled(StackedExperts):
        def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
            return 2.0 * super().forward(slots, counts)

    moe, x, seen = layer(), torch.randn(1, 8), []
    plain, _ = moe(x)
    handle = moe.experts.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(moe(x)[0], plain)
    assert seen == [1]
    handle.remove()
    doubled = Doubled(8, 12, 4)
    doubled.load_state_dict(moe.experts.state_dict())
    moe.experts = doubled.eval()
    torch.testing.assert_close(moe(x)[0], 2.0 * plain)


@pytest.mark.parametrize("weight", ["probability", "unit"])
@given(seed=st.integers(0, 999), ties=st.booleans())
@torch.no_grad()
def test_a_switch_router_prefers_the_same_expert_alone(weight: str, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = SwitchRouter(8, 5, weight=weight, bias=True).eval()
    for parameter in router.parameters():
        parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator).float())
    x = torch.randint(-2, 3, (1, 8), generator=generator).float() * (0.0 if ties else 1.0)
    expert, gate = router.alone(x)
    assignment = router(Tokens(x)).assignment
    assert expert == int(assignment.expert)
    assert gate == pytest.approx(float(assignment.weight))
