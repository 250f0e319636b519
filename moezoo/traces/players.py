"""Who stands in for a layer's routing while a trace is replayed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moezoo.errors import RoutingError
from moezoo.layer import MoE
from moezoo.private_torch import is_in_backward
from moezoo.records import Assignment, Routing, Tokens
from moezoo.traces.calls import moved, num_tokens


class Player:
    """Stands in for one layer's `route` and hands out its recorded calls in order."""

    def __init__(self, name: str, layer: MoE, calls: tuple[Routing, ...]) -> None:
        self.name, self.layer, self.calls = name, layer, calls
        self.played = 0

    def __call__(self, tokens: Tokens) -> Routing:
        recorded = self._next()
        if num_tokens(recorded) != tokens.num_tokens:
            raise RoutingError(
                f"layer {self.name!r} got another number of tokens than was recorded",
                expected=num_tokens(recorded),
                found=tokens.num_tokens,
            )
        return self._routed(tokens, recorded)

    def _routed(self, tokens: Tokens, recorded: Routing) -> Routing:
        live: Routing = self.layer.router(tokens)
        recorded = moved(recorded, tokens.x.device)
        return replace(
            live,
            assignment=recorded.assignment,
            proposed=recorded.proposed,
            sequence_length=tokens.sequence_length,
        )

    def check_finished(self) -> None:
        if self.played != len(self.calls):
            reason = f"layer {self.name!r} was called less often than was recorded"
            raise RoutingError(reason, expected=len(self.calls), found=self.played)

    def _next(self) -> Routing:
        if is_in_backward():  # recomputation inside backward
            if len(self.calls) != 1:
                reason = f"layer {self.name!r} is recomputed, and was recorded more than once"
                hint = "Replay one forward call at a time, or without activation checkpointing."
                raise RoutingError(reason, hint=hint)
            return self.calls[0]
        if self.played == len(self.calls):
            reason = f"layer {self.name!r} was called more often than was recorded"
            raise RoutingError(reason, expected=len(self.calls))
        self.played += 1
        return self.calls[self.played - 1]


class LivePlayer(Player):
    """A player whose recorded pairs have the weights that the router gives them now."""

    def _routed(self, tokens: Tokens, recorded: Routing) -> Routing:
        places, moved_call = places_of(recorded), moved(recorded, tokens.x.device)
        admitted, given = moved_call.assignment, moved_call.offered
        live: Routing = self.layer.router(tokens, given)
        proposed = live.assignment
        assert isinstance(admitted, Assignment) and isinstance(proposed, Assignment)
        weight_N = proposed.weight
        if places is not None:
            places = places.to(weight_N.device)
            weight_N = weight_N[places.clamp(min=0)]
            if live.probs is not None:  # a policy has moved pairs: they weigh as it weighs them
                moved_N = live.probs[admitted.token, admitted.expert].to(weight_N.dtype)
                weight_N = torch.where(places < 0, moved_N, weight_N)
        return replace(
            live,
            assignment=self.layer.router.reweigh(replace(admitted, weight=weight_N)),
            proposed=proposed,
            sequence_length=tokens.sequence_length,
        )


def places_of(recorded: Routing) -> Tensor | None:
    """Which proposed pair (N,) each admitted one is, -1 for one that a policy has moved; None:
    they stand in one order.
    """
    admitted, offered = recorded.assignment, recorded.offered
    assert isinstance(admitted, Assignment) and isinstance(offered, Assignment)
    keys_N, offered_N = (a.token * a.num_experts + a.expert for a in (admitted, offered))
    if torch.equal(keys_N, offered_N):
        return None
    ordered_N, pair_N = offered_N.sort()
    at_N = torch.searchsorted(ordered_N, keys_N).clamp(max=max(len(ordered_N) - 1, 0))
    return torch.where(ordered_N[at_N] == keys_N, pair_N[at_N], -1)
