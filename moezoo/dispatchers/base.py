"""What every dispatcher is: experts on other ranks, for whoever calls them as if they were here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.exchange import gradient_scaled
from moezoo.ops.eager import is_transformed
from moezoo.registry import Registry

Run = Callable[[Tensor, Tensor], Tensor]
GRADIENTS = ("mean", "sum")


class Dispatcher:
    """Brings the rows of this rank to the ranks that own their experts, and the results back.

    Rank r of R owns the experts r E / R ... (r + 1) E / R - 1. Every rank must call it equally
    often and in the same order, forward and backward, also with no row at all. A deep copy of a
    model shares it: it has no state but its process group.

    Args:
        group: the R ranks.
        gradients: "mean": of expert weights as of all others under DDP and FSDP, of the mean of the
            ranks' losses; "sum": of their sum, for loops that divide the loss by all tokens.

    A subclass says by `waits` whether the host waits for the device, and implements `exchange`.
    """

    waits: bool = True

    def __init__(
        self, group: dist.ProcessGroup, *, gradients: Literal["mean", "sum"] = "mean"
    ) -> None:
        if gradients not in GRADIENTS:
            wanted = " or ".join(map(repr, GRADIENTS))
            raise ConfigError(
                "unknown gradients", field="gradients", expected=wanted, found=repr(gradients)
            )
        self.group, self.gradients = group, gradients
        self.num_ranks = dist.get_world_size(group)

    def exchange(self, slots: Tensor, counts: Tensor, run: Run) -> Tensor:
        """`run` on the owners of the experts: what it would be of all experts here.

        Args:
            slots: (N, D), rows sorted by expert; rows past `counts.sum()` are unused.
            counts: (E,) int64, of all experts.
            run: rows (M, D) of this rank's experts and their counts (E / R,) -> (M, D'), zero in
                unused rows.

        Returns:
            (N, D'), zero in unused rows.
        """
        raise NotImplementedError

    def __call__(self, slots: Tensor, counts: Tensor, run: Run) -> Tensor:
        """`exchange`, with the gradients of weights scaled. Raises ConfigError under `torch.func`,
        whose transforms do not see through a collective.
        """
        if is_transformed():
            hint = "Use autograd, or a model whose experts are all here."
            reason = "experts on several ranks do not follow torch.func"
            raise ConfigError(reason, field="dispatcher", hint=hint)
        out: Tensor = _uncompiled(self, slots, counts, run)
        return out

    def scaled(self, run: Run) -> Run:
        """`run`, the gradients of whose weights are divided by the ranks when they are means."""
        factor = float(self.num_ranks) if self.gradients == "mean" else 1.0

        def scaled(rows: Tensor, counts: Tensor) -> Tensor:
            return gradient_scaled(run(gradient_scaled(rows, factor), counts), 1.0 / factor)

        return scaled

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_ranks} ranks, gradients={self.gradients!r})"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(dispatcher: Dispatcher, slots: Tensor, counts: Tensor, run: Run) -> Tensor:
    """A compiled layer calls it as it is: the sizes of what arrives are known only now."""
    return dispatcher.exchange(slots, counts, dispatcher.scaled(run))


registry: Registry[Dispatcher] = Registry("dispatcher", Dispatcher, "moezoo.dispatchers")
