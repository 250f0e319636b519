"""Any modules as experts: different sizes, different kinds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moezoo.errors import ConfigError, ShapeError
from moezoo.experts.base import Experts, registry
from moezoo.experts.feed_forward import FeedForward


@registry.register("modules")
class ModuleExperts(Experts):
    """Expert e is the module `each[e]`, which maps rows (n, D) to rows (n, D).

    Give modules of your own, or sizes: FFNs of different widths make the heterogeneous mixture of
    HMoE (arXiv 2408.10681). Each module runs once per call, on all its rows, also on none. The
    counts are read on the host, so a call waits for the device once.

    Args:
        d_model, num_experts: width and number of the experts.
        modules: the experts themselves, `num_experts` of them.
        sizes: without modules: the hidden width of each FFN; None: `d_ff` for all.
        d_ff, activation, dropout: of FFNs made here; see `FeedForward`.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        modules: Sequence[nn.Module] | None = None,
        sizes: Sequence[int] | None = None,
        d_ff: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.d_model, self.num_experts = d_model, num_experts
        if modules is None:
            sizes = _sizes(sizes, d_ff, num_experts)
            modules = [
                FeedForward(d_model, size, activation=activation, dropout=dropout) for size in sizes
            ]
        elif sizes is not None:
            raise ConfigError("modules and sizes exclude each other", field="sizes")
        if len(modules) != num_experts:
            raise ConfigError(
                "not one module per expert",
                field="modules",
                expected=num_experts,
                found=len(modules),
            )
        self.each = nn.ModuleList(modules)

    def expert(self, index: int) -> nn.Module:
        """The module of one expert."""
        return self.each[index]

    def expert_sizes(self) -> tuple[int, tuple[int, ...]]:
        return 0, tuple(sum(p.numel() for p in module.parameters()) for module in self.each)

    @property
    def waits(self) -> bool:
        return True  # for the sizes of the parts

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.tolist()
        parts = torch.split(slots, [*sizes, slots.shape[0] - sum(sizes)])
        rows = []
        for index, part in enumerate(parts[:-1]):
            out = self.expert(index)(part)
            if out.shape != part.shape:
                wanted, found = tuple(part.shape), tuple(out.shape)
                reason = f"expert {index} changed the shape of its rows"
                raise ShapeError(reason, field="modules", expected=wanted, found=found)
            rows.append(out)
        kind = rows[0].dtype
        return torch.cat([*rows, torch.zeros_like(parts[-1], dtype=kind)])


def _sizes(sizes: Sequence[int] | None, d_ff: int | None, num_experts: int) -> Sequence[int]:
    if sizes is None and d_ff is None:
        hint = "Pass modules=[...], sizes=[...] or d_ff=..."
        raise ConfigError("modules needs experts, or sizes to make them", field="sizes", hint=hint)
    if sizes is None:
        assert d_ff is not None
        return [d_ff] * num_experts
    if len(sizes) != num_experts:
        raise ConfigError(
            "not one size per expert", field="sizes", expected=num_experts, found=len(sizes)
        )
    return sizes
