"""The loss of a batch within a step of Trainer."""

from __future__ import annotations

from torch import Tensor

from moezoo.functional.collective import ranks_of_loss, summed_over_ranks
from moezoo.models.inputs import IGNORED


def share_of_step(
    loss: Tensor, routers: Tensor | None, labels: Tensor, num_items: Tensor | int
) -> Tensor:
    """The loss of a batch as its part of a step of `num_items` labels, which Trainer sums over
    batches and ranks. Ranks share the router losses of a batch equally, however many labels each
    has.
    """
    own = (labels != IGNORED).sum()
    share = loss * own / num_items
    ranks = ranks_of_loss()
    if ranks == 1 or routers is None:
        return share
    return share + routers * (summed_over_ranks(own) / ranks - own) / num_items
