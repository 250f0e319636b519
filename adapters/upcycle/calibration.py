"""What the layers of a dense model read on sample text, for routers that are fitted to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moezoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    LayerInputs = Mapping[str, Tensor]
else:
    LayerInputs = Mapping
_MAX_TOKENS = 8192


@dataclass(frozen=True)
class Calibration:
    """Sample token ids: sequences for the encoder; the decoder reads the same ones."""

    sequences: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not self.sequences or not all(self.sequences):
            raise ConfigError("calibration needs sequences of token ids", field="calibration")


def layer_inputs(
    path: Path, calibration: Calibration | None, layers: Sequence[str]
) -> dict[str, Tensor]:
    """The inputs (T, D) of the named MLPs of the dense checkpoint at `path`.

    Holds the dense model in memory. Raises ConfigError without sample text.
    """
    if calibration is None:
        raise ConfigError(
            "this router initialisation needs sample text",
            field="calibration",
            hint="Pass calibration (--calibration FILE), or use router_init='normal'.",
        )
    from moezoo.adapters.checkpoint import load

    return collected_inputs(load(path), calibration, layers)


def collected_inputs(
    model: nn.Module, calibration: Calibration, layers: Sequence[str]
) -> dict[str, Tensor]:
    """The inputs (T, D) in float32 of the named modules of a live model on sample text."""
    import torch

    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    handles = []
    for layer in layers:
        store = found[layer]

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], store: list[Tensor] = store) -> None:
            store.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float())

        handles.append(model.get_submodule(layer).register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            for sequence in calibration.sequences:
                ids = torch.tensor([list(sequence)])
                if hasattr(model, "decoder"):
                    model(ids, decoder_input_ids=ids)
                else:
                    model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(inputs)[:_MAX_TOKENS] for layer, inputs in found.items()}
