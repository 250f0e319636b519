"""What the experts of a model do on a text: loads, drops at other capacities, and their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moezoo import traces
from moezoo.capacity.switch import SwitchCapacity
from moezoo.functional.statistics import LayerStats
from moezoo.recording import record
from moezoo.records import Assignment, Routing, Tokens

FACTORS = (1.0, 1.25, 1.5, 2.0, 4.0)
TOP_TOKENS = 8
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class LayerReport:
    """One sparse layer on a text.

    Fields: name; stats; dropped_at, the share of pairs that the paper's capacity would drop by
    capacity factor (empty for soft routing); tokens, for each expert the pieces that it is chosen
    for most beyond chance, best first.
    """

    name: str
    stats: LayerStats
    dropped_at: dict[float, float]
    tokens: list[list[str]]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def routing_report(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], piece: Callable[[int], str]
) -> list[LayerReport]:
    """Run the model over batches, in evaluation, and report every sparse layer.

    Args:
        piece: the text of a token id.

    Raises ConfigError when the model has no sparse layer.
    """
    was_training = model.training
    model.eval()
    with record(model) as tape:
        ids: dict[str, list[Tensor | None]] = {name: [] for name in tape.layers}
        handles = [
            layer.router.register_forward_pre_hook(_ids_kept(ids[name]))
            for name, layer in tape.layers.items()
        ]
        try:
            for batch in batches:
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
            model.train(was_training)
    stats, trace = tape.stats(), traces.of(tape)
    dropped = {name: _dropped(trace, name) for name in tape.by_layer}
    return [
        LayerReport(name, stats[name], dropped[name], _favourites(calls, ids[name], piece))
        for name, calls in tape.by_layer.items()
    ]


def sparkline(counts: Sequence[int]) -> str:
    """Loads as one bar each; the mean is half height, twice the mean and more is full."""
    mean = sum(counts) / max(len(counts), 1)
    if not mean:
        return ""
    heights = (min(count / mean / 2, 1.0) for count in counts)
    return "".join(_BARS[round(height * (len(_BARS) - 1))] for height in heights)


def _ids_kept(store: list[Tensor | None]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tokens, ...]) -> None:
        store.append(inputs[0].ids)

    return hook


def _dropped(trace: traces.Trace, layer: str) -> dict[float, float]:
    calls = trace.by_layer[layer]
    if any(not isinstance(call.assignment, Assignment) for call in calls):
        return {}
    alone = traces.Trace({layer: calls})
    return {
        factor: traces.dropped(alone, SwitchCapacity(factor=factor).train())[layer]
        for factor in FACTORS
    }


def _favourites(
    calls: Sequence[Routing], ids: Sequence[Tensor | None], piece: Callable[[int], str]
) -> list[list[str]]:
    """Tokens by their share in the information that a token carries about its expert."""
    pairs = [
        (found[call.offered.token[call.offered.kept]], call.offered.expert[call.offered.kept])
        for call, found in zip(calls, ids, strict=True)
        if found is not None and isinstance(call.offered, Assignment)
    ]
    if not pairs:
        return []
    token_N = torch.cat([token for token, _ in pairs])
    expert_N = torch.cat([expert for _, expert in pairs])
    first = calls[0].offered
    assert isinstance(first, Assignment)
    known = token_N.bincount().nonzero().flatten()
    row_N = torch.searchsorted(known, token_N)
    count_VE = torch.zeros(len(known), first.num_experts, dtype=torch.float64, device="cpu")
    count_VE.index_put_((row_N, expert_N), count_VE.new_ones(()), accumulate=True)
    expected_VE = count_VE.sum(1, keepdim=True) * count_VE.sum(0) / count_VE.sum()
    gain_VE = torch.xlogy(count_VE, count_VE / expected_VE.clamp(min=1e-30))
    best = gain_VE.topk(min(TOP_TOKENS, len(known)), dim=0)
    return [
        [piece(int(known[row])) for row, gain in zip(rows, gains, strict=True) if gain > 0]
        for rows, gains in zip(best.indices.T, best.values.T, strict=True)
    ]
