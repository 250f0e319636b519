"""The dispatcher of training: every row travels to its expert, and nowhere else."""

from __future__ import annotations

from torch import Tensor

from moezoo.dispatchers.base import Dispatcher, Run, registry
from moezoo.functional.exchange import Exchange


@registry.register("alltoall")
class AllToAllDispatcher(Dispatcher):
    """Counts first, then rows, then the results, by all-to-all (GShard, 2006.16668, section 3.2).

    The bytes on the wire are the least there are: each row once there and once back, in backward
    too. The host waits once per call, for the counts.
    """

    def exchange(self, slots: Tensor, counts: Tensor, run: Run) -> Tensor:
        plan = Exchange.of(counts, self.group)
        return plan.to_senders(run(plan.to_owners(slots), plan.counts), slots.shape[0])
