"""What a look at the layers of a report suggests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moezoo.reporting.replays import FACTORS

_USUAL = 1.25  # the paper's capacity factor in training
_OURS = (
    "Train longer with a higher load-balance coefficient, move routers slowly "
    "(router_learning_rate) or, if it was not upcycled so, start from "
    "router_init='mean_orthogonal'."
)
_THEIRS = "Train with output_router_logits=True and a larger router_aux_loss_coef, if it has them."


def advice(layers: Sequence[dict[str, Any]], *, ours: bool = True) -> list[str]:
    """One line a finding: dead experts, and what the paper's capacity would drop.

    Args:
        ours: the model is moezoo's; those of transformers have words of their own, and most drop
            no tokens.
    """
    said = []
    for layer in layers:
        dead, experts = len(layer["dead"]), layer["experts"]
        if dead > experts // 8:
            said.append(
                f"{layer['name']}: {dead} of {experts} experts get no token. "
                + (_OURS if ours else _THEIRS)
            )
        at = dropped_at(layer, _USUAL)
        if ours and at is not None and at > 0.1:
            said.append(
                f"{layer['name']}: capacity factor {_USUAL:g} would drop {at:.0%} in training. "
                "Train with capacity='dropless', or balance the load first."
            )
    return said


def dropped_at(layer: dict[str, Any], factor: float) -> float | None:
    """The share of a layer's pairs that a factor of `FACTORS` would have dropped; None: unknown."""
    if layer["capacity"] is None:
        return None
    return float(layer["capacity"]["dropped"][FACTORS.index(factor)] / max(layer["offered"], 1))
