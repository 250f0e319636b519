"""The choice of experts equals `argmax`, whatever the scores and however many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moezoo.functional.assign import best_experts

# Below, at and above the number from which rows are looked at in windows; 257 has none.
SIZES = st.one_of(st.integers(1, 12), st.sampled_from([64, 255, 256, 257, 300, 320, 448]))
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0]


def scores(num_tokens: int, num_experts: int, seed: int, levels: int, special: int) -> Tensor:
    """(T, E) of few levels, so that maxima occur often, and some special values."""
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randint(levels, (num_tokens, num_experts), generator=source).float()
    for _ in range(special if num_tokens else 0):
        token, expert, which = (
            int(torch.randint(most, (), generator=source))
            for most in (num_tokens, num_experts, len(SPECIAL))
        )
        drawn[token, expert:] = SPECIAL[which]
    return drawn


drawn = st.builds(
    scores,
    st.integers(0, 6),
    SIZES,
    st.integers(0, 2**20),
    levels=st.sampled_from([1, 2, 3, 1000]),
    special=st.integers(0, 6),
)


@given(drawn)
def test_the_best_expert_is_argmax_for_ties_infinities_and_nan(choice: Tensor) -> None:
    assert torch.equal(best_experts(choice, 1), choice.argmax(-1, keepdim=True))


@given(drawn, st.integers(1, 12))
def test_k_choices_are_k_times_argmax(choice: Tensor, k: int) -> None:
    k, remaining, expected = min(k, choice.shape[1]), choice.clone(), []
    for _ in range(k):
        expected.append(remaining.argmax(-1, keepdim=True))
        remaining.scatter_(1, expected[-1], float("-inf"))
    before = choice.clone()
    assert torch.equal(best_experts(choice, k), torch.cat(expected, 1))
    assert torch.equal(choice.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [8, 300])
def test_every_precision_and_stride_chooses_alike(dtype: torch.dtype, num_experts: int) -> None:
    choice = scores(20, num_experts, 0, 7, 3).to(dtype)
    expected = choice.argmax(-1, keepdim=True)
    assert torch.equal(best_experts(choice, 1), expected)
    assert torch.equal(best_experts(choice.t().contiguous().t(), 1), expected)
    assert torch.equal(best_experts(choice[:, None].expand(-1, 2, -1)[:, 0], 1), expected)
