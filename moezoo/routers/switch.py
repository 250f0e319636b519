"""Top-1 routing, the router of Switch Transformers."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.errors import ConfigError
from moezoo.functional.assign import token_choice
from moezoo.functional.drawn import DrawnLinear, normal_
from moezoo.functional.gates import gate, gate_probs, is_plain_gate, jittered
from moezoo.ops.observed import is_observed
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry

ROUTER_INIT_STD = 0.02


def classifier(d_model: int, num_experts: int, *, bias: bool = False) -> DrawnLinear:
    """The linear gate (E, D) with weights of standard deviation 0.02, as in the published models,
    and a bias of zero.
    """
    return DrawnLinear(d_model, num_experts, partial(normal_, std=ROUTER_INIT_STD), bias=bias)


@registry.register("switch")
class SwitchRouter(Router):
    """Send every token to its most probable expert (Switch Transformers, 2101.03961, section 2.1).

    The pair's weight is the winning probability, p_i(x) of eq. 2, so the gate learns through the
    expert's output. Ties go to the lowest expert.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        bias: give the classifier a bias.
        jitter: in training, multiply the router's input by U(1 - jitter, 1 + jitter) (section 2.4).
        weight: "probability", or "unit" for p / stopgrad(p): the value is exactly 1 and the gate
            still gets its gradient, so that equal experts compute the dense layer, to the rounding
            of its products.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        bias: bool = False,
        jitter: float = 0.0,
        weight: Literal["probability", "unit"] = "probability",
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_jitter(jitter)
        if weight not in ("probability", "unit"):
            allowed = "'probability' or 'unit'"
            raise ConfigError(
                "unknown weight", field="weight", expected=allowed, found=repr(weight)
            )
        self.d_model, self.num_experts = d_model, num_experts
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.jitter = jitter
        self.weight = weight
        self.deterministic = jitter == 0.0
        self.straight_through = weight == "unit"

    def logits(self, x_TD: Tensor) -> Tensor:
        """Expert scores (T, E) in float32 (or float64)."""
        if self.training and self.jitter > 0.0:
            x_TD = jittered(x_TD, self.jitter)
        return gate(self.classifier, x_TD)

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = self.logits(tokens.x)
        probs_TE = gate_probs(logits_TE)
        # At least tiny: where a probability underflows, 0 / 0 would reach the gradients as NaN.
        tiny = torch.finfo(probs_TE.dtype).tiny
        unit = self.weight == "unit"
        gate_TE = probs_TE / probs_TE.detach().clamp(min=tiny) if unit else probs_TE
        assignment = token_choice(probs_TE, gate_TE, 1, tokens, given)
        return Routing(assignment, logits=logits_TE, probs=probs_TE, real=tokens.real)

    def may_be_alone(self) -> bool:
        return is_plain_gate(self.classifier) and not is_observed(self, "logits", "reweigh")

    def alone(self, row: Tensor) -> tuple[int, float]:
        # As `forward` but for the last bits of the scores, whose product need not suit a batch too.
        logits_1E = F.linear(row, self.classifier.weight, self.classifier.bias)
        (probs,) = logits_1E.softmax(dim=-1).tolist()
        weight = max(probs)
        return probs.index(weight), 1.0 if self.weight == "unit" else weight


def check_sizes(d_model: int, num_experts: int, choices: int = 1) -> None:
    """Refuse sizes that no router can have. Raises ConfigError."""
    for name, value in (("d_model", d_model), ("num_experts", num_experts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number >= 1", field=name, found=repr(value))
    if isinstance(choices, bool) or not isinstance(choices, int) or not 1 <= choices <= num_experts:
        wanted = f"a whole number from 1 to num_experts = {num_experts}"
        raise ConfigError("k is out of range", field="k", expected=wanted, found=repr(choices))


def check_jitter(jitter: float) -> None:
    """Refuse a jitter outside [0, 1). Raises ConfigError."""
    if not 0.0 <= jitter < 1.0:
        raise ConfigError("jitter lies in [0, 1)", field="jitter", found=jitter)
