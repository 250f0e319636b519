"""What every expert container is: E functions over rows that are sorted by expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moezoo.component import Component
from moezoo.records import Assignment
from moezoo.registry import Registry

if TYPE_CHECKING:
    from moezoo.dispatchers.base import Dispatcher


class Experts(Component):
    """Runs expert e over its `counts[e]` rows; it sees neither tokens nor, but in float16, weights.

    Attributes: num_experts; d_model (input and output width); row_wise: a row's output depends on
    that row alone; takes_weights: `forward` takes the rows' weights (N,) as a third argument and
    multiplies by them before it rounds a result to the dtype. A layer passes them in float16,
    whose range an expert's result may leave where the weighted one does not. dispatcher: brings
    rows to the ranks that hold the experts; None: all are here.
    """

    num_experts: int
    d_model: int
    row_wise: bool = True
    dispatcher: Dispatcher | None = None

    @property
    def takes_weights(self) -> bool:
        return False

    @property
    def is_spread(self) -> bool:
        """Whether experts are on other ranks, so that every call counts: all ranks must make it."""
        return self.dispatcher is not None

    @property
    def waits(self) -> bool:
        """Whether `forward` makes the host wait for a GPU whatever the dtype (for some dtypes every
        container does, `moezoo.ops.backends.never_waits`); a CUDA graph cannot hold it then.
        """
        return self.dispatcher is not None and self.dispatcher.waits

    def expert_sizes(self) -> tuple[int, tuple[int, ...]]:
        """Parameters that every row meets, and those of each expert alone: stacks (E, ..., ...) are
        divided among the experts, all else is common.
        """
        common, each = 0, 0
        for parameter in self.parameters():
            if parameter.dim() > 2 and parameter.shape[0] == self.num_experts:
                each += parameter.numel() // self.num_experts
            else:
                common += parameter.numel()
        return common, (each,) * self.num_experts

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            slots: (N, D), rows sorted by expert; rows past `counts.sum()` are unused and may hold
                anything.
            counts: (E,) int64.

        Returns:
            (N, D), zero in unused rows. Experts without rows get a zero gradient, never None.
        """
        raise NotImplementedError

    def alone(self, row: Tensor, expert: int) -> Tensor:
        """`forward` for one row (1, D) of an expert that the host knows, without a gradient: a
        token to decode. A container may know a shorter way.
        """
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=row.device)
        counts[expert] = 1
        y: Tensor = self(row, counts)
        return y

    def fused(self, x_TD: Tensor, assignment: Assignment) -> Tensor | None:
        """dispatch, `forward` and combine of tokens (T, D) at once and without a gradient, where a
        container knows a faster way; None: it does not.
        """
        return None


registry: Registry[Experts] = Registry("expert container", Experts, "moezoo.experts")
