"""Random routing: the baseline that every learned router has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.functional.assign import best_experts, pairs_of
from moezoo.functional.gates import gate_dtype
from moezoo.records import Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_whole
from moezoo.routers.switch import check_sizes

_ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


@registry.register("random")
class RandomRouter(Router):
    """Send every token to k experts drawn uniformly, each with weight 1 / k (THOR, 2110.04260).

    In training the draw comes from torch's generator (`torch.manual_seed`); in evaluation from a
    hash of `seed`, the token's position in its group and the expert, so that evaluating twice gives
    the same numbers. No parameters, no logits.

    Args:
        d_model, num_experts: sizes of the layer that it routes for.
        k: experts per token.
        seed: of the choices in evaluation.
    """

    has_logits = False
    has_probs = False
    deterministic = False

    def __init__(self, d_model: int, num_experts: int, *, k: int = 1, seed: int = 0) -> None:
        super().__init__()
        check_sizes(d_model, num_experts, k)
        check_whole("seed", seed, 0, 2**31 - 1)
        self.d_model, self.num_experts, self.k, self.seed = d_model, num_experts, k, seed

    @property
    def choices(self) -> int:
        return self.k

    def forward(self, tokens: Tokens) -> Routing:
        device, dtype = tokens.x.device, gate_dtype(tokens.x.dtype)
        if self.training:
            score_TE = torch.rand(tokens.num_tokens, self.num_experts, device=device)
        else:
            score_TE = self._hashed(tokens)
        expert_TK = best_experts(score_TE, self.k)
        weight_TK = torch.full_like(expert_TK, 1.0, dtype=dtype) / self.k
        pairs = pairs_of(expert_TK, weight_TK, self.num_experts, tokens)
        return Routing(pairs, real=tokens.real)

    def _hashed(self, tokens: Tokens) -> Tensor:
        """Scores (T, E) in [0, 1) from positions alone (the finaliser of splitmix64)."""
        place_T = torch.arange(tokens.num_tokens, device=tokens.x.device)
        place_T = place_T % max(tokens.group_size, 1)
        expert_E = torch.arange(self.num_experts, device=tokens.x.device)
        word_TE = (place_T[:, None] * self.num_experts + expert_E + 1) * _ODD[0] + self.seed
        for odd, shift in ((_ODD[1], 30), (_ODD[2], 27)):
            word_TE = (word_TE ^ ((word_TE >> shift) & (2 ** (64 - shift) - 1))) * odd
        return ((word_TE >> 40) & 0xFFFFFF).float() / 2**24
