"""From a mask to proposed pairs: every token takes as many experts as it has earned."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.functional.assign import best_experts, pairs_of
from moezoo.records import Assignment, Tokens


def varying_choice(
    chosen_TE: Tensor, gate_TE: Tensor, tokens: Tokens, max_choices: int | None
) -> Assignment:
    """Give every real token the experts marked in `chosen`, weighed by `gate`.

    Args:
        chosen_TE: (T, E) bool.
        gate_TE: (T, E), >= 0.
        max_choices: at most so many experts per token, those of the highest gate (ties to the
            lowest index), in rank-major order; None: all of them, in token order. None needs one
            synchronisation with the device, which has to say how many there are.
    """
    num_tokens, num_experts = chosen_TE.shape
    if max_choices is not None:
        ranked_TE = torch.where(chosen_TE, gate_TE, -1.0)
        expert_TK = best_experts(ranked_TE, max_choices)
        pairs = pairs_of(expert_TK, gate_TE.gather(1, expert_TK), num_experts, tokens)
        earned_N = chosen_TE.gather(1, expert_TK).t().reshape(-1)
        return with_kept(pairs, earned_N)
    if tokens.real is not None:
        chosen_TE = chosen_TE & tokens.real[:, None]
    token_N, expert_N = chosen_TE.nonzero(as_tuple=True)
    return Assignment(
        token=token_N,
        expert=expert_N,
        weight=gate_TE[token_N, expert_N],
        kept=torch.ones_like(token_N, dtype=torch.bool),
        num_tokens=num_tokens,
        num_experts=num_experts,
        group_size=tokens.group_size,
    )


def with_kept(pairs: Assignment, kept_N: Tensor) -> Assignment:
    """The same pairs, kept only where `kept_N` (N,) agrees; the others weigh 0."""
    both_N = pairs.kept & kept_N
    return Assignment(
        token=pairs.token,
        expert=pairs.expert,
        weight=torch.where(both_N, pairs.weight, pairs.weight.new_zeros(())),
        kept=both_N,
        num_tokens=pairs.num_tokens,
        num_experts=pairs.num_experts,
        group_size=pairs.group_size,
        choices=pairs.choices,
        rank_major=pairs.rank_major,
    )
