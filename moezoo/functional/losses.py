"""Router losses as functions of plain tensors. Padding never counts; zero real tokens give 0, never
NaN.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moezoo.functional.collective import ranks_of_loss, summed_over_ranks
from moezoo.records import Assignment


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least: in half precision a mean over tokens would be rounded or overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_mean(value_T: Tensor, real: Tensor | None) -> Tensor:
    """The mean of (T,) over real tokens; 0 when there are none."""
    if real is None:
        return value_T.sum() / max(value_T.numel(), 1)
    # `where` and not a product: a padding row may hold NaN or infinity.
    total = torch.where(real, value_T, value_T.new_zeros(())).sum()
    return total / real.sum().clamp(min=1)


def z_loss(logits_TE: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over real tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    logits_TE = _wide(logits_TE)
    return masked_mean(logits_TE.logsumexp(dim=-1).square(), real)


def mean_over_ranks(mean: Tensor, real: Tensor | None, num_tokens: int) -> Tensor:
    """A mean over this rank's real tokens as its part of the mean over the tokens of all ranks:
    times its share of them and the number of ranks, so that the mean over ranks, of values and of
    gradients, is that of all tokens together. As `global_load_balance`, who must call it included.
    """
    ranks = ranks_of_loss()
    if ranks == 1:
        return mean
    own = mean.new_tensor(num_tokens) if real is None else real.sum().to(mean.dtype)
    return mean * (own * ranks / summed_over_ranks(own).clamp(min=1))


def squared_variation(value_E: Tensor) -> Tensor:
    """CV^2, the variance of (E,) over the square of its mean; 0 where all are 0 (1701.06538, eq.
    7).
    """
    mean = value_E.mean()
    tiny = torch.finfo(value_E.dtype).tiny
    return (value_E - mean).square().mean() / mean.square().clamp(min=tiny)


def importance(assignment: Assignment) -> Tensor:
    """CV^2 of the weight that every expert gets from the kept pairs (1701.06538, eq. 6-7)."""
    weight_N = torch.where(assignment.kept, _wide(assignment.weight), 0.0)
    total_E = weight_N.new_zeros(assignment.num_experts)
    return squared_variation(total_E.index_add(0, assignment.expert, weight_N))


def expert_fractions(
    assignment: Assignment, real: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """f (G, E): the pairs that each expert is offered, per real token of the group.

    `assignment` is the router's own, before any capacity policy. Rows sum to the choices per token;
    rows of padding are 0. `group_size` None: one group, the batch.
    """
    a = assignment
    size = a.num_tokens if group_size is None else group_size
    groups = a.num_tokens // size if size else 0
    key_N = (a.token // max(size, 1)) * a.num_experts + a.expert
    dtype = torch.promote_types(a.weight.dtype, torch.float32)  # which counts every pair
    count = torch.zeros(groups * a.num_experts, dtype=dtype, device=a.weight.device)
    count = count.index_add(0, key_N, a.kept.to(count.dtype))
    return count.view(groups, a.num_experts) / group_counts(a.num_tokens, real, size, count)


def group_counts(num_tokens: int, real: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Real tokens per group as (G, 1), at least 1."""
    groups = num_tokens // size if size else 0
    if real is None:
        return like.new_full((groups, 1), float(max(size, 1)))
    return real.view(groups, max(size, 1)).sum(1, keepdim=True).clamp(min=1).to(like.dtype)


def load_balance(
    probs_TE: Tensor,
    assignment: Assignment,
    real: Tensor | None = None,
    *,
    group_size: int | None = None,
) -> Tensor:
    """E * sum_e f_e P_e, averaged over groups that hold real tokens (Switch Transformers, eq. 4-6).

    f is the share of tokens sent to expert e, P its mean probability; k at uniform routing.
    """
    probs_TE = _wide(probs_TE)
    num_tokens, num_experts = probs_TE.shape
    size = num_tokens if group_size is None else group_size
    if num_tokens == 0:
        return probs_TE.sum()
    if num_tokens % size:
        return _filled_up_load_balance(probs_TE, assignment, real, size)
    f_GE = expert_fractions(assignment, real, size)
    groups = f_GE.shape[0]
    p_TE = (
        probs_TE if real is None else torch.where(real[:, None], probs_TE, probs_TE.new_zeros(()))
    )
    mean_GE = p_TE.view(groups, size, num_experts).sum(1) / group_counts(
        num_tokens, real, size, f_GE
    )
    loss_G = num_experts * (f_GE.detach() * mean_GE).sum(-1)
    return masked_mean(loss_G, None if real is None else real.view(groups, size).any(1))


def _filled_up_load_balance(
    probs_TE: Tensor, assignment: Assignment, real: Tensor | None, size: int
) -> Tensor:
    """`load_balance` when padding at the end does not fill up a whole sequence."""
    missing = -probs_TE.shape[0] % size
    if real is None:
        real = torch.ones(probs_TE.shape[0], dtype=torch.bool, device=probs_TE.device)
    count = assignment.num_tokens + missing  # of which the last have no pair
    longer = replace(assignment, num_tokens=count, choices=0, rank_major=False)
    probs_TE = torch.cat([probs_TE, probs_TE.new_zeros(missing, probs_TE.shape[1])])
    real = torch.cat([real, real.new_zeros(missing)])
    return load_balance(probs_TE, longer, real, group_size=size)


def global_load_balance(
    probs_TE: Tensor, assignment: Assignment, real: Tensor | None = None
) -> Tensor:
    """E * sum_e f_e P_e with f over the tokens of all ranks (arXiv 2501.11873, eq. 4).

    A rank's value is its part times the number of ranks, so that the mean over ranks, of values and
    of gradients, is the loss of all tokens together. Every rank must call it while gradients are
    recorded; without them it is the loss of the rank's own tokens.
    """
    probs_TE = _wide(probs_TE)
    counted = torch.where(assignment.kept, 1.0, 0.0).to(probs_TE.dtype)
    load_E = counted.new_zeros(assignment.num_experts)
    load_E = load_E.index_add(0, assignment.expert, counted)
    num_real = load_E.new_tensor(probs_TE.shape[0]) if real is None else real.sum().to(load_E.dtype)
    ranks, everywhere = ranks_of_loss(), torch.cat([load_E, num_real[None]])
    if ranks > 1:
        everywhere = summed_over_ranks(everywhere)
    total = everywhere[-1].clamp(min=1)
    p_TE = probs_TE if real is None else torch.where(real[:, None], probs_TE, 0.0)
    share_E = p_TE.sum(0) * ranks / total
    return assignment.num_experts * (everywhere[:-1] / total * share_E).sum()
