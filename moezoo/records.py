"""The nouns: what flows from router to policy to experts. Frozen, with `check()` for their numbered
invariants.

Shapes, one alphabet for the package (docs/shapes.md): T tokens, G groups, S tokens per group (T = G
* S), D width, E experts, K choices per token, N token-expert pairs, P slots per expert (soft
routing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moezoo.errors import RoutingError, ShapeError
from moezoo.private_torch import is_seen_through


def _require(holds: bool, record: str, number: int, claim: str) -> None:
    if not holds:
        raise RoutingError(f"{record} breaks invariant {number}: {claim}")


@is_seen_through
@dataclass(frozen=True)
class Tokens:
    """A flat batch of tokens, in G contiguous groups of `group_size`.

    Fields: x (T, D) floating; ids (T,) int64 or None; real (T,) bool or None (None: all real; False
    marks padding); sequence_length: tokens per sequence, 0 when unknown.
    Invariants: 1 x has two dimensions; 2 group_size divides T; 3 ids and real have length T.
    """

    x: Tensor
    ids: Tensor | None = None
    real: Tensor | None = None
    group_size: int = 0  # 0: one group holds the whole batch
    sequence_length: int = 0

    def __post_init__(self) -> None:
        if self.x.dim() != 2:
            raise ShapeError(
                "Tokens.x has the wrong rank", expected="(T, D)", found=tuple(self.x.shape)
            )
        if self.group_size == 0:
            object.__setattr__(self, "group_size", self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]

    @property
    def num_groups(self) -> int:
        return self.num_tokens // self.group_size if self.group_size else 0

    def check(self) -> Tokens:
        """Raise RoutingError for the first broken invariant; return self."""
        _require(self.x.dim() == 2, "Tokens", 1, "x is (T, D)")
        size = self.group_size
        divides = self.num_tokens == 0 or (size > 0 and self.num_tokens % size == 0)
        _require(divides, "Tokens", 2, f"group_size {size} divides T = {self.num_tokens}")
        for name, value in (("ids", self.ids), ("real", self.real)):
            fits = value is None or value.shape == (self.num_tokens,)
            _require(fits, "Tokens", 3, f"{name} has shape ({self.num_tokens},)")
        return self


@is_seen_through
@dataclass(frozen=True)
class Assignment:
    """N proposed token-expert pairs; list order is priority order.

    Fields: token (N,) int64, expert (N,) int64, weight (N,) float32 (float64 for float64 input),
    kept (N,) bool. `choices` = k > 0 promises that every token has exactly k pairs, kept or not; 0
    promises nothing. `rank_major` promises besides that all first choices come in token order, then
    all second ones: pair j * T + t is token t's.
    Invariants: 1 indices in range; 2 kept pairs unique; 3 padding is never kept (`check(real)`);
    4 weights finite and >= 0; 5 order is priority (a promise; queues are prefixes of it); 6 pairs
    stand as `choices` and `rank_major` promise.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    kept: Tensor
    num_tokens: int
    num_experts: int
    group_size: int
    choices: int = 0
    rank_major: bool = False

    @property
    def num_pairs(self) -> int:
        return self.token.shape[0]

    @property
    def num_groups(self) -> int:
        return self.num_tokens // self.group_size if self.group_size else 0

    def check(self, real: Tensor | None = None) -> Assignment:
        """Raise RoutingError for the first broken invariant; return self. Synchronises: for tests
        and debugging.
        """
        name = "Assignment"
        same = all(t.shape == self.token.shape for t in (self.expert, self.weight, self.kept))
        _require(
            same and self.token.dim() == 1, name, 1, "token, expert, weight and kept are all (N,)"
        )
        in_range = bool(((self.token >= 0) & (self.token < max(self.num_tokens, 1))).all())
        in_range &= bool(((self.expert >= 0) & (self.expert < self.num_experts)).all())
        _require(in_range, name, 1, "0 <= token < num_tokens and 0 <= expert < num_experts")
        _require(self._stands_as_promised(), name, 6, "choices and rank_major hold")
        pair = (self.token * self.num_experts + self.expert)[self.kept]
        _require(
            len(set(pair.tolist())) == pair.numel(),
            name,
            2,
            "a token is kept at most once per expert",
        )
        if real is not None:
            _require(
                not bool((self.kept & ~real[self.token]).any()), name, 3, "padding is never kept"
            )
        _require(bool(torch.isfinite(self.weight).all()), name, 4, "weights are finite")
        _require(bool((self.weight >= 0).all()), name, 4, "weights are >= 0")
        return self

    def _stands_as_promised(self) -> bool:
        if not self.choices:
            return not self.rank_major
        token_N = torch.arange(self.num_tokens, device=self.token.device)
        given = self.token if self.rank_major else self.token.sort().values
        each = token_N.repeat if self.rank_major else token_N.repeat_interleave
        return torch.equal(given, each(self.choices))


@is_seen_through
@dataclass(frozen=True)
class SoftAssignment:
    """Dense routing: every slot is a mean over tokens, every token a mean over slots (Soft MoE).

    Fields: dispatch (G, S, E, P), combine (G, S, E, P), both float32 (float64 for float64 input).
    Invariants: 1 equal shapes; 2 dispatch sums to 1 over S (0 for a group of padding); 3 combine
    sums to 1 over (E, P) for real tokens, 0 for padding; 4 both finite and >= 0.
    """

    dispatch: Tensor
    combine: Tensor

    @property
    def num_experts(self) -> int:
        return self.dispatch.shape[2]

    def check(self, real: Tensor | None = None, *, atol: float = 1e-4) -> SoftAssignment:
        """Raise RoutingError for the first broken invariant; return self."""
        name = "SoftAssignment"
        same = self.dispatch.dim() == 4 and self.dispatch.shape == self.combine.shape
        _require(same, name, 1, "dispatch and combine are both (G, S, E, P)")
        groups, size = self.dispatch.shape[:2]
        flags = (
            torch.ones(groups, size, dtype=torch.bool, device="cpu")
            if real is None
            else real.view(groups, size).cpu()
        )
        columns = self.dispatch.detach().sum(1).cpu()
        wanted = flags.any(1)[:, None, None].to(columns.dtype).expand_as(columns)
        _require(
            torch.allclose(columns, wanted, atol=atol),
            name,
            2,
            "dispatch sums to 1 over the tokens of a group",
        )
        rows = self.combine.detach().sum((2, 3)).cpu()
        _require(
            torch.allclose(rows, flags.to(rows.dtype), atol=atol),
            name,
            3,
            "combine sums to 1 over the slots",
        )
        for tensor in (self.dispatch, self.combine):
            fine = bool((torch.isfinite(tensor) & (tensor >= 0)).all())
            _require(fine, name, 4, "dispatch and combine are finite and >= 0")
        return self


@is_seen_through
@dataclass(frozen=True)
class Routing:
    """What a router decided for one batch of tokens.

    Fields: assignment (after the layer: as admitted by the capacity policy); logits, probs (T, E)
    float32 or None;
    losses: unweighted scalars that only the router can compute; real (T,) bool or None as in
    Tokens;
    proposed: the router's own assignment, set by the layer once a policy has admitted it;
    sequence_length: tokens per sequence as the layer was given them, 0 when unknown.
    """

    assignment: Assignment | SoftAssignment
    logits: Tensor | None = None
    probs: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    real: Tensor | None = None
    proposed: Assignment | SoftAssignment | None = None
    sequence_length: int = 0

    @property
    def offered(self) -> Assignment | SoftAssignment:
        """The assignment before any capacity policy."""
        return self.assignment if self.proposed is None else self.proposed


@is_seen_through
@dataclass(frozen=True)
class Slots:
    """What experts see: rows sorted by expert.

    Fields: x (N, D); counts (E,) int64. Rows [sum(counts[:e]), sum(counts[:e + 1])) belong to
    expert e; rows past sum(counts) are unused and their output is zero.
    """

    x: Tensor
    counts: Tensor
