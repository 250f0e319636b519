"""Hash layers: a fixed table says which expert a token goes to."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.assign import pairs_of
from moezoo.functional.gates import gate_dtype
from moezoo.records import Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_one_of, check_whole
from moezoo.routers.switch import check_sizes


@registry.register("hash")
class HashRouter(Router):
    """Route by token id through a fixed table (Hash Layers, arXiv 2106.04426, section 3.2).

    expert = table[id], weight 1: no parameters, no logits, no context. The table is a buffer, drawn
    once from `seed`, and saved with the model.

    Args:
        d_model, num_experts: sizes of the layer that it routes for.
        vocab_size: ids lie in [0, vocab_size).
        table: "random" (each id by itself), "balanced" (equal numbers of ids per expert), or
            "frequency" (most frequent ids first, each to the expert with the least so far).
        seed: of the table.
        frequencies: how often each id occurs, for table="frequency".
    """

    has_logits = False
    has_probs = False
    needs_token_ids = True

    table: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        vocab_size: int,
        *,
        table: Literal["random", "balanced", "frequency"] = "balanced",
        seed: int = 0,
        frequencies: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_whole("vocab_size", vocab_size, 1)
        check_one_of("table", table, ("random", "balanced", "frequency"))
        check_whole("seed", seed, 0, 2**63 - 1)
        self.d_model, self.num_experts, self.vocab_size = d_model, num_experts, vocab_size
        self.kind, self.seed = table, seed
        self.frequencies = _checked(frequencies, vocab_size) if table == "frequency" else ()
        self.register_buffer("table", torch.empty(vocab_size, dtype=torch.int64))
        self.reset_own()

    def reset_own(self) -> None:
        if self.table.is_meta:
            return  # a table takes its time, and nobody would read this one
        if self.kind == "frequency":
            drawn = _by_frequency(self.frequencies, self.num_experts)
        else:
            balanced = self.kind == "balanced"
            drawn = _drawn(self.vocab_size, self.num_experts, self.seed, balanced=balanced)
        self.table.copy_(drawn)

    def forward(self, tokens: Tokens) -> Routing:
        if tokens.ids is None:
            raise ConfigError("HashRouter routes by token: it needs token_ids", field="token_ids")
        ids_T = tokens.ids
        if tokens.real is not None:
            ids_T = torch.where(tokens.real, ids_T, 0)  # padding may hold any id, -100 included
        expert_T1 = self.table[ids_T][:, None]
        weight_T1 = torch.ones_like(expert_T1, dtype=gate_dtype(tokens.x.dtype))
        return Routing(pairs_of(expert_T1, weight_T1, self.num_experts, tokens), real=tokens.real)


def _drawn(vocab_size: int, num_experts: int, seed: int, *, balanced: bool) -> Tensor:
    source = torch.Generator("cpu").manual_seed(seed)
    if not balanced:
        return torch.randint(num_experts, (vocab_size,), generator=source, device="cpu")
    return torch.randperm(vocab_size, generator=source, device="cpu") % num_experts


def _by_frequency(frequencies: Sequence[float], num_experts: int) -> Tensor:
    load = [(0.0, expert) for expert in range(num_experts)]
    table = [0] * len(frequencies)
    for token in sorted(range(len(table)), key=lambda token: (-frequencies[token], token)):
        so_far, expert = load[0]
        table[token] = expert
        heapq.heapreplace(load, (so_far + frequencies[token], expert))
    return torch.tensor(table, dtype=torch.int64, device="cpu")


def _checked(frequencies: Sequence[float] | None, vocab_size: int) -> Sequence[float]:
    if frequencies is None or len(frequencies) != vocab_size or min(frequencies) < 0:
        found = "none" if frequencies is None else f"{len(frequencies)} values"
        wanted = f"{vocab_size} numbers >= 0"
        reason = "table='frequency' needs the frequency of every id"
        raise ConfigError(reason, field="frequencies", expected=wanted, found=found)
    return frequencies
