"""What a family of checkpoints is: its config.json, both ways, and what its layout can hold."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moezoo.config import SwitchConfig
from moezoo.registry import Registry

TASK_SUFFIX = {
    "conditional_generation": "ForConditionalGeneration",
    "model": "Model",
    "encoder": "EncoderModel",
}


@dataclass(frozen=True)
class Weights:
    """What the tensors of a checkpoint say where its config may be silent or wrong.

    names: every tensor, without a prefix. own_head: an lm_head that differs from the embeddings.
    own_embeddings: stacks whose table of embeddings differs from the shared one.
    """

    names: frozenset[str]
    own_head: bool
    own_embeddings: tuple[str, ...] = ()

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith("decoder.block.") for name in self.names)


class Family(abc.ABC):
    """One `model_type` of config.json (or several that mean the same)."""

    model_types: tuple[str, ...] = ()
    mlp: str  # what the layout calls a block's MLP

    @abc.abstractmethod
    def read(self, values: Mapping[str, Any], weights: Weights) -> SwitchConfig:
        """The config that a config.json means for these weights. Raises ConfigError naming the
        field.
        """

    @abc.abstractmethod
    def write(self, config: SwitchConfig, task: str) -> dict[str, Any]:
        """The config.json of a model; `refusal` must be None."""

    @abc.abstractmethod
    def refusal(self, config: SwitchConfig) -> str | None:
        """Why the layout cannot hold a model, or None when it can."""

    def copies(self, config: SwitchConfig, task: str) -> tuple[str, ...]:
        """Names under which the layout wants the shared embeddings once more: none of most."""
        return ()


registry: Registry[Family] = Registry(
    "checkpoint family",
    Family,  # type: ignore[type-abstract]
    "moezoo.adapters",
)
