"""The next token from scores: the likeliest, or one that is drawn among the likely."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moezoo.generation_options import GenerationOptions
from moezoo.models.logits_rules import Rule

_TOP_H_AMONG = 100  # as in transformers


def warpers_of(options: GenerationOptions) -> list[Rule]:
    """What shapes a draw, in transformers' order; nothing where nothing is drawn."""
    rules: list[Rule] = []
    if options.do_sample:
        # Beams need a token that goes on beside those that end.
        keep = 1 if options.num_beams == 1 else max(len(options.eos_token_ids) + 1, 2)
        if options.temperature != 1.0:
            rules.append(lambda ids, scores: scores / options.temperature)
        if options.top_h is not None:
            rules.append(partial(_top_h, share=options.top_h))
        if options.top_k:
            rules.append(partial(_top_k, k=max(options.top_k, keep)))
        if options.top_p < 1.0:
            rules.append(partial(_top_p, share=options.top_p, keep=keep))
        if options.min_p is not None:
            rules.append(partial(_min_p, share=options.min_p, keep=keep))
        if options.typical_p < 1.0:
            rules.append(partial(_typical, share=options.typical_p, keep=keep))
        if 0.0 < options.epsilon_cutoff < 1.0:
            rules.append(partial(_epsilon, least=options.epsilon_cutoff, keep=keep))
        if 0.0 < options.eta_cutoff < 1.0:
            rules.append(partial(_eta, least=options.eta_cutoff, keep=keep))
    if options.renormalize_logits:
        rules.append(lambda ids, scores: scores.log_softmax(-1))
    return rules


def drawn(scores: Tensor, count: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """`count` different columns (R, count) of scores (R, N), each drawn by its probability."""
    return torch.multinomial(scores.softmax(-1), count, generator=generator)


def _top_k(ids: Tensor, scores: Tensor, *, k: int) -> Tensor:
    return scores.masked_fill(scores < _kth(scores, k), -torch.inf)


def _top_p(ids: Tensor, scores: Tensor, *, share: float, keep: int) -> Tensor:
    ordered, order = scores.sort(dim=-1)
    # Drop the unlikely tail whose mass is at most 1 - share.
    tail = ordered.softmax(-1).cumsum(-1) <= 1.0 - share
    tail[:, -keep:] = False
    return scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)


def _min_p(ids: Tensor, scores: Tensor, *, share: float, keep: int) -> Tensor:
    probs = scores.softmax(-1)
    dropped = probs < share * probs.amax(-1, keepdim=True)
    dropped.scatter_(1, probs.topk(min(keep, probs.shape[1])).indices, False)
    return scores.masked_fill(dropped, -torch.inf)


def _top_h(ids: Tensor, scores: Tensor, *, share: float) -> Tensor:
    """Top-H sampling: the likeliest tokens whose entropy sums up to a share of all."""
    values, order = scores.topk(min(_TOP_H_AMONG, scores.shape[1]))
    parts = _entropy_parts(values.log_softmax(-1))
    kept = parts.cumsum(-1) <= share * parts.sum(-1, keepdim=True)
    kept[:, 0] = True
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, ~kept)
    return scores.masked_fill(dropped, -torch.inf)


def _typical(ids: Tensor, scores: Tensor, *, share: float, keep: int) -> Tensor:
    """Locally typical sampling (arXiv 2202.00666)."""
    log_probs = scores.log_softmax(-1)
    entropy = _entropy_parts(log_probs).sum(-1, keepdim=True)
    surprise, order = (-log_probs - entropy).abs().sort(dim=-1)
    mass = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (mass < share).sum(1, keepdim=True).clamp_(max=scores.shape[1] - 1)
    dropped = surprise > surprise.gather(1, last)
    dropped[:, :keep] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def _epsilon(ids: Tensor, scores: Tensor, *, least: float, keep: int) -> Tensor:
    """Epsilon sampling (arXiv 2210.15191)."""
    dropped = (scores.softmax(-1) < least) & (scores < _kth(scores, keep))
    return scores.masked_fill(dropped, -torch.inf)


def _eta(ids: Tensor, scores: Tensor, *, least: float, keep: int) -> Tensor:
    """Eta sampling (arXiv 2210.15191): the bound falls with the entropy."""
    entropy = _entropy_parts(scores.log_softmax(-1)).sum(-1, keepdim=True)
    bound = (least**0.5 * torch.exp(-entropy)).clamp(max=least)
    dropped = (scores.softmax(-1) < bound) & (scores < _kth(scores, keep))
    return scores.masked_fill(dropped, -torch.inf)


def _kth(scores: Tensor, k: int) -> Tensor:
    return scores.topk(min(k, scores.shape[1])).values[:, -1:]


def _entropy_parts(log_probs: Tensor) -> Tensor:
    """-p log p, 0 where p is."""
    return -(log_probs.exp() * log_probs).nan_to_num(nan=0.0)
