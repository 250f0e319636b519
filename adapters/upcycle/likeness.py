"""Which experts of a layer are alike, and into which groups they are joined."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.shapes import matrix_names

Group = tuple[int, ...]
_HELD = 1 << 22  # numbers of all experts at a time
# Relative to the squares that are added up: below it a difference is rounding, and twins are equal.
_ROUNDING = 1e-12


def distances(checkpoint: CheckpointSource, layer: str) -> Tensor:
    """Squared distances (E, E) between the experts of a layer, float64."""
    count = checkpoint.config.num_experts
    products = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for matrix in matrix_names(checkpoint.config):
        names = [part.name for part in checkpoint.tensors[f"{layer}.experts.{matrix}"]]
        size, width = checkpoint.source.tensor(names[0]).numel(), max(_HELD // count, 1)
        for start in range(0, size, width):
            piece = slice(start, start + width)
            parts = [checkpoint.source.tensor(name).reshape(-1)[piece] for name in names]
            rows = torch.stack(parts).double()
            products += rows @ rows.T
    squares = products.diagonal()
    total = squares[:, None] + squares
    distance = total - products - products.T
    return torch.where(distance > _ROUNDING * total, distance, 0.0)


def joined(distance: Tensor, count: int) -> tuple[Group, ...]:
    """Join the two likest groups until `count` are left, smaller groups first among equals.

    Groups are as far apart as their two members that differ most (complete linkage).
    """
    groups: list[Group] = [(expert,) for expert in range(len(distance))]
    while len(groups) > count:
        sizes = torch.tensor([len(group) for group in groups], device="cpu")
        first, second = _likest(distance, sizes)
        rest = [k for k in range(len(groups)) if k not in (first, second)]
        apart = torch.maximum(distance[first], distance[second])[rest]
        distance = distance[rest][:, rest]
        distance = torch.cat([torch.cat([distance, apart[:, None]], 1),
                              torch.cat([apart, apart.new_zeros(1)])[None]])  # fmt: skip
        both = tuple(sorted((*groups[first], *groups[second])))
        groups = [*(groups[k] for k in rest), both]
    return tuple(sorted(groups))


def _likest(distance: Tensor, size: Tensor) -> tuple[int, int]:
    """The two of least distance, then of least size together, then of lowest index."""
    below = torch.ones_like(distance, dtype=torch.bool).tril(-1)
    nearest = below & (distance == distance[below].min())
    together = torch.where(nearest, size[:, None] + size, torch.iinfo(size.dtype).max)
    second, first = (together == together.min()).nonzero()[0].tolist()
    return first, second
