"""What every router loss is: a function of a routing, zero for zero real tokens, never NaN."""

from __future__ import annotations

from torch import Tensor

from moezoo.component import Component
from moezoo.records import Routing
from moezoo.registry import Registry


class RouterLoss(Component):
    """One unweighted scalar per routing. `needs` names the Routing fields that must be there
    ("logits", "probs",
    "assignment") or, as "losses.NAME", an entry that the router computes itself."""

    needs: frozenset[str] = frozenset()

    def forward(self, routing: Routing) -> Tensor:
        """The loss of one layer, a float32 (or float64) scalar over real tokens."""
        raise NotImplementedError


registry: Registry[RouterLoss] = Registry("router loss", RouterLoss, "moezoo.losses")
