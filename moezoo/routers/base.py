"""What every router is: it proposes which experts see which tokens, and with what weight."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from moezoo.component import Component
from moezoo.records import Assignment, Routing, Tokens
from moezoo.registry import Registry


class Router(Component):
    """Turns tokens into a routing.

    A subclass declares its properties; the conformance kit tests what they imply. One with
    parameters or buffers of its own sets them in `reset_own` (see `Component`).

    Class or instance attributes:
        causal: a token's proposed pairs depend on that token alone (or on earlier ones in its
            group).
        has_logits, has_probs: `Routing.logits` / `Routing.probs` (rows sum to 1) are set.
        needs_token_ids: `Tokens.ids` must be given.
        soft: the assignment is a SoftAssignment; no capacity policy applies.
        owns_capacity: the router itself bounds how many tokens each expert takes (expert choice,
            BASE).
        deterministic: the same tokens give the same routing, in training too.
        batch_invariant: a token's pairs do not depend on the other tokens of the batch.
        straight_through: weights carry a gradient that their values do not follow, such as that of
            p / stopgrad(p), which is 1.
        own_losses: names of the losses that the router returns in `Routing.losses`.
        default_losses: coefficients by loss name for configs that name none (the paper's 0.01).
    """

    causal: bool = True
    has_logits: bool = True
    has_probs: bool = True
    needs_token_ids: bool = False
    soft: bool = False
    owns_capacity: bool = False
    deterministic: bool = True
    batch_invariant: bool = True
    straight_through: bool = False
    own_losses: frozenset[str] = frozenset()
    default_losses: Mapping[str, float] = MappingProxyType({"load_balance": 0.01, "z": 0.0})

    d_model: int
    num_experts: int

    @property
    def choices(self) -> int:
        """Pairs per token, or 0 when the number varies."""
        return 1

    def expert_rows(self, num_tokens: int) -> float:
        """Rows that experts compute per token on average, in a group of so many tokens; what the
        cost of a model is reckoned by.
        """
        return float(self.choices or self.num_experts)

    @property
    def takes_given(self) -> bool:
        """Whether `forward(tokens, given)` takes pairs that were chosen elsewhere, in the place of
        the router's own choice, and weighs them as if it had chosen them.
        """
        return "given" in inspect.signature(type(self).forward).parameters

    @property
    def waits(self) -> bool:
        """Whether `forward`, in the current mode, makes the host wait for a GPU: no CUDA graph can
        hold it then.
        """
        return False

    def forward(self, tokens: Tokens) -> Routing:
        """Propose an assignment for `tokens`; never changes them."""
        raise NotImplementedError

    def reweigh(self, admitted: Assignment) -> Assignment:
        """Weights as the router wants them once a policy has admitted pairs; the same by
        default.
        """
        return admitted

    def may_be_alone(self) -> bool:
        """Whether nobody observes what `alone` passes by, in a class with an `alone` of its own."""
        return False

    def alone(self, row: Tensor) -> tuple[int, float]:
        """The expert of one token (1, D) in float32 and its weight, for the host, in evaluation, as
        `forward` and `reweigh` give them.
        """
        raise NotImplementedError

    def adapt(self, routings: Sequence[Routing]) -> None:
        """Adapt state that no gradient trains (balancing biases, thresholds), once per optimizer
        step, from that step's routings; nothing by default. Never done inside `forward`:
        recomputation under activation checkpointing would do it twice and route differently.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "adapt" in vars(cls):
            cls.adapt = _in_float32(cls.adapt)  # type: ignore[method-assign, assignment]


Adapt = Callable[[Any, Sequence[Routing]], None]


def _in_float32(adapt: Adapt) -> Adapt:
    """`adapt` on buffers whose small steps are not lost, even where a tool has cast their data."""

    @functools.wraps(adapt)
    def widened(self: Router, routings: Sequence[Routing]) -> None:
        self.widen_buffers()
        adapt(self, routings)

    return widened


registry: Registry[Router] = Registry("router", Router, "moezoo.routers")
