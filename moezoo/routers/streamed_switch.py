"""Top-1 routing over thousands of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.functional.assign import pairs_of
from moezoo.functional.gates import gate, gate_dtype, is_plain_gate, jittered, outside_autocast
from moezoo.functional.losses import expert_fractions
from moezoo.functional.streamed import streamed_top_1, top_1_of
from moezoo.records import Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.switch import check_jitter, check_sizes, classifier


@registry.register("streamed_switch")
class StreamedSwitchRouter(Router):
    """The choice and gradients of `switch` without ever holding a score per token and expert.

    Switch Transformers, 2101.03961, section 2.1, for the 2,048 experts of its section 5: logits and
    probabilities of 8,192 tokens would be 128 MiB, here they come and go in chunks of 1 MiB, and
    backward computes them again. What the losses "load_balance" (over the batch) and "z" need is
    summed up on the way. The weights are those of `switch`, so checkpoints serve both.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        bias, jitter: as for `switch`.
    """

    has_logits = False
    has_probs = False
    own_losses = frozenset({"load_balance", "z"})

    def __init__(
        self, d_model: int, num_experts: int, *, bias: bool = False, jitter: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_jitter(jitter)
        self.d_model, self.num_experts = d_model, num_experts
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.jitter = jitter
        self.deterministic = jitter == 0.0

    def forward(self, tokens: Tokens) -> Routing:
        x_TD, real = tokens.x, tokens.real
        if self.training and self.jitter > 0.0:
            x_TD = jittered(x_TD, self.jitter)
        if real is not None:  # padding may hold anything
            x_TD = torch.where(real[:, None], x_TD, x_TD.new_zeros(()))
        dtype = gate_dtype(x_TD.dtype)
        if is_plain_gate(self.classifier):
            weight, bias = self.classifier.weight, self.classifier.bias
            bias_E = None if bias is None else bias.to(dtype)
            with outside_autocast(x_TD):
                expert_T, gate_T, mean_E, z = streamed_top_1(
                    x_TD.to(dtype), weight.to(dtype), bias_E, real
                )
        else:
            expert_T, gate_T, mean_E, z = top_1_of(gate(self.classifier, x_TD), real)
        pairs = pairs_of(expert_T[:, None], gate_T[:, None], self.num_experts, tokens)
        share_E: Tensor = expert_fractions(pairs, real).sum(0)
        balance = self.num_experts * (share_E * mean_E).sum()
        return Routing(pairs, losses={"load_balance": balance, "z": z}, real=real)
