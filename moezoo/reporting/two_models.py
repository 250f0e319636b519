"""Two models side by side: their outputs, where each expert stands, and what is routed alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moezoo import traces
from moezoo.errors import ConfigError
from moezoo.layer import MoE
from moezoo.reporting.layers import rounded
from moezoo.reporting.observation import Batch, Observation, observe

_CHUNK = 1 << 18  # numbers of an expert that are compared at once
Outputs = Sequence[Tensor]


class Comparison:
    """Collects the outputs of two models on the same batches, then says how they differ.

    Args:
        one, other: the model of the report and the one that it is held against.
    """

    def __init__(self, one: nn.Module, other: nn.Module, *, name: str) -> None:
        self.one, self.other, self.name = one, other, name
        self._batches: list[Batch] = []
        self._outputs: list[Tensor] = []

    def keep(self, batch: Batch, output: Any) -> None:
        """A batch and what `one` made of it."""
        self._batches.append(batch)
        self._outputs.append(_values(output))

    def document(self, seen: Observation) -> dict[str, Any]:
        """The part of a report; `seen` is what `one` did on the batches that were kept.

        Raises ConfigError where the two cannot be given the same batches, or are of other widths.
        """
        found: list[Tensor] = []
        theirs = observe(
            self.other, self._batches, on_output=lambda _, out: found.append(_values(out))
        )
        agreement = _agreement(seen, theirs)
        layers = []
        for name in seen.trace.by_layer:
            parent, siblings = _distances(self.one.get_submodule(name), _part(self.other, name))
            agreed = agreement.get(name)
            layers.append(
                {"layer": name, "agreement": agreed, "parent": parent, "siblings": siblings}
            )
        return {"name": self.name, "dense": theirs.dense, **_error(self._outputs, found),
                "layers": layers}  # fmt: skip


def _values(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    found = getattr(output, "last_hidden_state", None) if logits is None else logits
    if not isinstance(found, Tensor):
        raise ConfigError("the outputs are neither logits nor hidden states", field="against")
    return found.detach().float().cpu()


def _error(ones: Outputs, others: Outputs) -> dict[str, float | None]:
    """Relative error of the outputs in the Euclidean norm, and the largest difference of two."""
    apart = size = largest = 0.0
    for one, other in zip(ones, others, strict=True):
        width = min(one.shape[-1], other.shape[-1])  # the tokens that both know
        if one.shape[:-1] != other.shape[:-1]:
            raise ConfigError("the two models do not read the same batches", field="against")
        gap = (one[..., :width] - other[..., :width]).double()
        apart += float(gap.square().sum())
        size += float(other[..., :width].double().square().sum())
        largest = max(largest, float(gap.abs().max()) if gap.numel() else 0.0)
    relative = math.sqrt(apart / size) if size else 0.0
    return {"error": rounded(relative, 3), "largest": rounded(largest, 3)}


def _agreement(seen: Observation, theirs: Observation) -> Mapping[str, float | None]:
    """By layer, the share of tokens with the same experts; nothing where a model is dense."""
    if seen.dense or theirs.dense:
        return {}
    common = [name for name in seen.trace.by_layer if name in theirs.trace.by_layer]
    parts = [
        traces.Trace({name: of.trace.by_layer[name] for name in common}) for of in (seen, theirs)
    ]
    found = traces.compare(*parts) if common else {}
    return {name: rounded(each.agreement) for name, each in found.items()}


def _part(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


@torch.no_grad()
def _distances(
    layer: nn.Module, other: nn.Module | None
) -> tuple[list[float | None] | None, list[float | None] | None]:
    """Of every expert the distance to its parent and, on average, to its siblings, as a share of
    its own length: the root of the mean square over its matrices. None where there is none.

    A parent is multiplied by what brings it nearest, matrix by matrix, because an exact upcycling
    multiplies `wo`.
    """
    if not isinstance(layer, MoE):
        return None, None
    own = stacks(layer)
    if not own:
        return None, None
    siblings = torch.stack([_between(stack) for stack in own.values()])
    parents = _parents(own, other)
    return (None if parents is None else _listed(parents)), _listed(siblings)


def stacks(layer: MoE) -> dict[str, Tensor]:
    """The matrices (E, ..., ...) of a layer's experts by name: stacked ones, and of modules of
    one shape.
    """
    count = layer.router.num_experts
    found: dict[str, list[Tensor]] = {}
    for name, parameter in layer.experts.named_parameters():
        if parameter.dim() > 2 and parameter.shape[0] == count:
            found[name] = list(parameter.detach())
        elif any(part.isdigit() for part in name.split(".")):
            bare = ".".join(part for part in name.split(".")[1:] if not part.isdigit())
            found.setdefault(bare, []).append(parameter.detach())
    return {
        name.removesuffix(".weight"): torch.stack(parts)
        for name, parts in found.items()
        if len(parts) == count and len({part.shape for part in parts}) == 1
    }


def _between(stack: Tensor) -> Tensor:
    """Each expert's mean square distance (E,) to the others over its own square length."""
    rows_EN = stack.flatten(1)
    count = rows_EN.shape[0]
    gram_EE = torch.zeros(count, count, dtype=torch.float64, device=stack.device)
    length_E = torch.zeros(count, dtype=torch.float64, device=stack.device)
    for part in torch.split(rows_EN, _CHUNK, dim=1):
        wide = part.double()
        length_E += wide.square().sum(1)
        wide = wide - wide.mean(0)  # distances stay, and equal experts are exactly 0
        gram_EE += wide @ wide.T
    square_E = gram_EE.diagonal()
    apart_EE = (square_E[:, None] + square_E - 2 * gram_EE).clamp(min=0)
    return apart_EE.sum(1) / max(count - 1, 1) / length_E.clamp(min=1e-300)


def _parents(own: Mapping[str, Tensor], other: nn.Module | None) -> Tensor | None:
    """Each expert's square distance (matrices, E) from its parent over its own square length."""
    if other is None:
        return None
    theirs = stacks(other) if isinstance(other, MoE) else {
        name.removesuffix(".weight"): parameter.detach()[None]
        for name, parameter in other.named_parameters()
    }  # fmt: skip
    rows = []
    for name, stack in own.items():
        parent = theirs.get(name)
        if parent is None or parent.shape[0] not in (1, len(stack)):
            return None
        if parent.shape[1:] != stack.shape[1:]:
            return None
        rows.append(torch.stack([
            _nearest(stack[e], parent[e % len(parent)]) for e in range(len(stack))
        ]))  # fmt: skip
    return torch.stack(rows)


def _nearest(expert: Tensor, parent: Tensor) -> Tensor:
    mine, theirs = expert.flatten().double(), parent.to(expert.device).flatten().double()
    factor = (mine @ theirs) / theirs.square().sum().clamp(min=1e-300)
    return (mine - factor * theirs).square().sum() / mine.square().sum().clamp(min=1e-300)


def _listed(squares: Tensor) -> list[float | None]:
    return [rounded(value, 3) for value in squares.mean(0).sqrt().tolist()]
