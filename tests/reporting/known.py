"""Routing that is known: the expert of a token follows from its id and the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.capacity.first_come import FirstCome
from moezoo.records import Assignment, Routing
from moezoo.reporting.observation import Observation
from moezoo.traces import Trace

EXPERTS, LAYERS = 8, 3
WORDS = "the expert of every token is chosen by a router and not by its place in a text".split()


def word(number: int) -> str:
    return f"\u2581{WORDS[number % len(WORDS)]}"


def expert_of(number: int, layer: int) -> int:
    """The last expert gets nothing."""
    return (number + layer * (number // 3)) % (EXPERTS - 1)


def share_of(number: int) -> float:
    return 0.3 + 0.1 * (number % 7)


def call(ids: Tensor, real: Tensor, layer: int, *, factor: float = 1.0) -> Routing:
    """A call of a layer on sequences of 10 ids, capped by first come."""
    expert = torch.tensor([expert_of(i, layer) for i in ids.tolist()])
    share = torch.tensor([share_of(i) for i in ids.tolist()])
    probs = ((1 - share)[:, None] / (EXPERTS - 1)).repeat(1, EXPERTS)
    probs[torch.arange(len(ids)), expert] = share
    offered = Assignment(
        torch.arange(len(ids)), expert, share, real.clone(), len(ids), EXPERTS, len(ids), choices=1
    )
    proposal = Routing(offered, probs=probs, real=real, sequence_length=10)
    admitted = FirstCome(factor=factor)(proposal)
    return Routing(admitted, probs=probs, real=real, proposed=offered, sequence_length=10)


def observation() -> Observation:
    """Three layers over two batches of 40 tokens, some of them padding."""
    batches = [torch.arange(40) * 3 % 17 + 17 * n for n in range(2)]
    real = torch.ones(40, dtype=torch.bool)
    real[[8, 9, 19, 38, 39]] = False
    names = [f"encoder.blocks.{layer}.mlp" for layer in range(LAYERS)]
    trace = {
        name: tuple(call(ids, real, layer) for ids in batches) for layer, name in enumerate(names)
    }
    return Observation(
        Trace(trace),
        {name: tuple(batches) for name in names},
        {name: FirstCome(factor=1.0) for name in names},
    )


def real_ids(seen: Observation) -> list[int]:
    """Ids of all real tokens in order."""
    name = next(iter(seen.trace.by_layer))
    return [
        number
        for ids, routing in zip(seen.ids[name], seen.trace.by_layer[name], strict=True)
        for number, real in zip(ids.tolist(), routing.real.tolist(), strict=True)
        if real
    ]
