"""Routers that adapt between steps, under transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from moezoo.errors import ConfigError
from moezoo.layer import MoE
from moezoo.private_torch import is_in_backward
from moezoo.records import Routing


class AdaptRouters(TrainerCallback):  # type: ignore[misc]
    """A Trainer callback that lets routers adapt what no gradient trains (balancing biases,
    thresholds) after each optimizer step, as `moezoo.training` does.

    Without it such routers train with the state that they started with; all others need it not.
    """

    def __init__(self) -> None:
        self._seen: dict[MoE, list[Routing]] = {}
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Watch every sparse layer. Raises ConfigError where Trainer would smooth labels by a loss
        of its own, without the router losses.
        """
        if args.label_smoothing_factor:
            hint = f"Set model.config.label_smoothing = {args.label_smoothing_factor} instead."
            reason = "Trainer's loss has no router losses"
            raise ConfigError(reason, field="label_smoothing_factor", hint=hint)
        for layer in [module for module in model.modules() if isinstance(module, MoE)]:
            self._seen[layer] = []
            self._handles.append(layer.register_forward_hook(self._keep))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adapt to the routings of the step, all of its accumulated batches."""
        for layer, routings in self._seen.items():
            layer.router.adapt(routings)
            routings.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _keep(self, layer: nn.Module, inputs: Any, output: tuple[Any, Routing]) -> None:
        # A layer that runs within backward is recomputed under activation checkpointing: the same
        # routing again.
        recomputed = is_in_backward()
        # A copy has the hook too, and is none of the layers that are adapted.
        if layer.training and not recomputed and layer in self._seen:
            self._seen[layer].append(output[1])
