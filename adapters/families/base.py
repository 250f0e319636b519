"""What a family of checkpoints is: its config.json, both ways, and what its layout can hold."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moezoo.adapters.names import disk_names, is_stray
from moezoo.adapters.shapes import Shape, parameter_shapes
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


class ModelConfig(Protocol):
    """What the verbs ask of a model's config, T5's or a decoder's."""

    @property
    def num_experts(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def decoder_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def wo_scale(self) -> float | None: ...
    @property
    def encoder_sparse(self) -> tuple[int, ...]: ...
    @property
    def decoder_sparse(self) -> tuple[int, ...]: ...
    @property
    def is_gated(self) -> bool: ...
    @property
    def feed_forward_proj(self) -> str: ...
    @property
    def router(self) -> Any: ...
    @property
    def experts(self) -> Any: ...
    def replace(self, **changes: Any) -> Any:
        """A copy with other values."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""


class Family(abc.ABC):
    """One `model_type` of config.json (or several that mean the same)."""

    model_types: tuple[str, ...] = ()
    mlp: str  # what the layout calls a block's MLP

    @property
    def title(self) -> str:
        """What the layout is called."""
        names = {"switch_transformers": "Switch", "t5": "T5", "umt5": "UMT5"}
        return names.get(self.model_types[0], self.model_types[0])

    def disk_names(self, name: str, *, num_experts: int = 0) -> list[str]:
        """The names on disk of a parameter: one, or one per expert for a stack."""
        return disk_names(name, mlp=self.mlp, num_experts=num_experts)

    def shapes(self, config: Any, task: str) -> dict[str, Shape]:
        """The shape of every parameter by its name in memory; experts are stacked (E, ...)."""
        return parameter_shapes(config, task)

    def is_stray(self, name: str) -> bool:
        """Whether a tensor on disk never meant anything."""
        return is_stray(name)

    @abc.abstractmethod
    def read(self, values: Mapping[str, Any], weights: Weights) -> Any:
        """The config that a config.json means for these weights. Raises ConfigError naming the
        field.
        """

    @abc.abstractmethod
    def write(self, config: Any, task: str) -> dict[str, Any]:
        """The config.json of a model; `refusal` must be None."""

    @abc.abstractmethod
    def refusal(self, config: Any) -> str | None:
        """Why the layout cannot hold a model, or None when it can."""

    def copies(self, config: Any, task: str) -> tuple[str, ...]:
        """Names under which the layout wants the shared embeddings once more: none of most."""
        return ()


registry: Registry[Family] = Registry(
    "checkpoint family",
    Family,  # type: ignore[type-abstract]
    "moezoo.adapters",
)
