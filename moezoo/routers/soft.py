"""Soft MoE: every slot is a mean over tokens, every token a mean over slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.functional.drawn import normal_
from moezoo.functional.gates import gate_dtype, gate_logits
from moezoo.records import Routing, SoftAssignment, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import accept_scalar, check_whole
from moezoo.routers.switch import check_sizes


@registry.register("soft")
class SoftRouter(Router):
    """Mix all tokens of a group into E * P slots and back (Soft MoE, arXiv 2308.00951, eq. 1-3).

    With logits x Phi: dispatch is their softmax over the tokens of a group, combine their softmax
    over all slots. Nothing is dropped and all is differentiable. As in the paper's section 2.3, x
    and Phi are normalised to length 1 first, and a learned scale multiplies the logits.

    Args:
        d_model, num_experts: sizes of the slot parameters (E * P, D).
        slots: slots per expert, P. The paper takes E * P near the number of tokens per group.
        normalize: the normalisation of section 2.3.
    """

    causal = False
    has_logits = False
    has_probs = False
    soft = True
    batch_invariant = False

    def __init__(
        self, d_model: int, num_experts: int, *, slots: int = 1, normalize: bool = True
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_whole("slots", slots, 1)
        self.d_model, self.num_experts, self.slots = d_model, num_experts, slots
        self.normalize = normalize
        self.phi = nn.Parameter(torch.empty(num_experts * slots, d_model))
        self.scale = nn.Parameter(torch.empty(1)) if normalize else None
        accept_scalar(self, "scale")
        self.reset_own()

    def reset_own(self) -> None:
        normal_(self.phi, std=self.d_model**-0.5)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    @property
    def choices(self) -> int:
        return 0

    def expert_rows(self, num_tokens: int) -> float:
        return self.num_experts * self.slots / max(num_tokens, 1)

    def forward(self, tokens: Tokens) -> Routing:
        groups, size = tokens.num_groups, tokens.group_size
        logits = self._logits(tokens).view(groups, size, self.num_experts * self.slots)
        combine = logits.softmax(dim=-1)
        if tokens.real is None:
            dispatch = logits.softmax(dim=1)
        else:
            real_GS1 = tokens.real.view(groups, size, 1)
            # A finite lowest value: a group of padding alone must not become 0 / 0.
            lowest = torch.finfo(logits.dtype).min
            dispatch = torch.where(real_GS1, logits, lowest).softmax(dim=1)
            dispatch = torch.where(real_GS1, dispatch, 0.0)
            combine = torch.where(real_GS1, combine, 0.0)
        shape = (groups, size, self.num_experts, self.slots)
        return Routing(SoftAssignment(dispatch.view(shape), combine.view(shape)), real=tokens.real)

    def _logits(self, tokens: Tokens) -> Tensor:
        """Scores (T, E * P) of tokens for slots, in float32 or float64."""
        dtype = gate_dtype(tokens.x.dtype)
        x_TD, phi = tokens.x.to(dtype), self.phi.to(dtype)
        if tokens.real is not None:
            x_TD = torch.where(tokens.real[:, None], x_TD, 0.0)
        if self.scale is None:
            return gate_logits(x_TD, phi)
        return gate_logits(unit_rows(x_TD), self.scale.to(dtype) * unit_rows(phi))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays, and its gradient is finite."""
    return F.normalize(x, dim=-1, eps=1e-6)
