"""The policy of Switch Transformers: first come in training, no drops in evaluation."""

from __future__ import annotations

from typing import Literal

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.first_come import FirstCome
from moezoo.records import Routing


@registry.register("switch")
class SwitchCapacity(FirstCome):
    """First come with factor 1.25 in training; dropless in evaluation unless `eval_factor` is
    given.

    Switch Transformers, section 2.2; the published models evaluate with factor 2.0. Dropless by
    default, so that decoding with a cache equals the whole sequence at once: a limit that binds
    would see other queues.

    Args:
        factor: capacity factor in training.
        eval_factor: capacity factor in evaluation; None: dropless.
        rule: see `moezoo.capacity.limits`.
        order: "token" by default, which is causal for k > 1 too.
    """

    keeps_one = True

    def __init__(
        self,
        *,
        factor: float = 1.25,
        eval_factor: float | None = None,
        rule: str = "switch",
        order: Literal["rank", "token"] = "token",
    ) -> None:
        super().__init__(factor=factor, eval_factor=eval_factor, rule=rule, order=order)
        self.drops_in_eval = eval_factor is not None

    def with_factor(self, factor: float) -> CapacityPolicy | None:
        changed = super().with_factor(factor)
        assert isinstance(changed, SwitchCapacity)
        changed.drops_in_eval = True
        return changed

    def limit(self, routing: Routing) -> int | None:
        if not self.training and not self.drops_in_eval:
            return None
        return super().limit(routing)
