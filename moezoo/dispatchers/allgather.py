"""The dispatcher of decoding: all rows travel to every rank, and the host never waits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.dispatchers.base import Dispatcher, Run, registry
from moezoo.functional.collective import gathered_counts, gathered_rows, scattered_sum
from moezoo.functional.exchange import permuted


@registry.register("allgather")
class AllGatherDispatcher(Dispatcher):
    """Every rank gathers the rows of all, runs its own experts, and the results are summed.

    R - 1 times the rows of `alltoall` and more travel, but every size is known beforehand: for few
    rows, as in decoding, and for CUDA graphs. On a GPU every rank must bring equally many rows, as
    equal batches do; on a CPU, where looking costs nothing, the largest number is taken.
    """

    waits = False

    def exchange(self, slots: Tensor, counts: Tensor, run: Run) -> Tensor:
        num_rows = slots.shape[0]
        sizes = gathered_counts(torch.cat([counts, counts.new_tensor([num_rows])]), self.group)
        longest = int(sizes[:, -1].max()) if slots.is_cpu else num_rows
        if longest > num_rows:
            slots = torch.cat([slots, slots.new_zeros(longest - num_rows, slots.shape[1])])
        rows, place = gathered_rows(slots, self.group), _places(sizes[:, :-1], longest)
        mine = counts.shape[0] // self.num_ranks
        first = dist.get_rank(self.group) * mine
        # This rank's experts first, by expert and then rank; what belongs to others is unused.
        key = torch.where((place >= first) & (place < first + mine), place - first, mine)
        order = key.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.shape[0], device=order.device)
        )
        own = sizes[:, first : first + mine].sum(0)
        results = permuted(run(permuted(rows, order, inverse), own), inverse, order)
        return scattered_sum(results, self.group)[:num_rows]


def _places(counts_RE: Tensor, length: int) -> Tensor:
    """The expert (R * length,) of every row of every rank; E for unused rows."""
    end_RE = counts_RE.cumsum(1)
    row_RL = torch.arange(length, device=counts_RE.device).expand(counts_RE.shape[0], length)
    return torch.searchsorted(end_RE, row_RL.contiguous(), right=True).view(-1)
