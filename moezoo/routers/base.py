"""What every router is: it proposes which experts see which tokens, and with what weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from moezoo.records import Assignment, Routing, Tokens
from moezoo.registry import Registry


class Router(nn.Module):
    """Turns tokens into a routing.

    A subclass declares its properties; the conformance kit tests what they imply.

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

    def adapt(self, routings: Sequence[Routing]) -> None:
        """Adapt state that no gradient trains (balancing biases, thresholds), once per optimizer
        step, from that step's routings; nothing by default. Never done inside `forward`:
        recomputation under activation checkpointing would do it twice and route differently.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Balancing buffers stay float32 in a bfloat16 model: their small steps would be lost.
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(after.device)
        return self


registry: Registry[Router] = Registry("router", Router, "moezoo.routers")
