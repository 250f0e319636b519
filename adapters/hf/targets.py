"""What PEFT adapts in a wrapped model where its config names no modules: what it does in T5."""

from __future__ import annotations

import importlib.util

_NAMES = {
    "layer_norm": ("attention_norm", "cross_norm", "mlp_norm"),
    "final_layer_norm": ("final_norm",),
    "wi": ("wi", "wi_0", "wi_1"),
}


def register_targets(model_type: str) -> None:
    """Add a model type to PEFT's tables of default targets, beside T5, where PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft.utils import constants

    for table in vars(constants).values():
        if isinstance(table, dict) and isinstance(table.get("t5"), list):
            ours = [name for theirs in table["t5"] for name in _NAMES.get(theirs, (theirs,))]
            table.setdefault(model_type, ours)
