"""What every wrapped model shares: building, loading, saving, gradient checkpointing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moezoo.adapters.checkpoint import load, save
from moezoo.adapters.hf.configuration import MoezooConfig
from moezoo.adapters.names import is_ignored, memory_name
from moezoo.building import TASKS, build
from moezoo.errors import ConfigError, TensorMismatch

_INNER = "model."


class MoezooPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """A moezoo model of one task as `self.model`, saved in moezoo's own layout.

    Whatever `moezoo.load` reads, `from_pretrained` reads; whatever `save_pretrained` writes,
    `moezoo.load` reads. Weights are moezoo's: transformers neither draws nor ties them.
    """

    config_class = MoezooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    task = ""
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: MoezooConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        self.model: Any = build(config.switch, task=self.task) if model is None else model
        self.post_init()

    @classmethod
    def wrap(cls, model: nn.Module) -> Any:
        """Wrap a live moezoo model; its weights are shared, not copied.

        Raises ConfigError for a model of another task.
        """
        wanted = TASKS[cls.task]
        if type(model) is not wanted:
            raise ConfigError(
                f"{cls.__name__} cannot wrap it",
                field="model",
                expected=wanted.__name__,
                found=type(model).__name__,
            )
        switch: Any = model.config
        return cls(MoezooConfig.of(switch, task=cls.task), model).train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: MoezooConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a directory of moezoo, T5 or Switch weights, in evaluation mode; see `moezoo.load`.

        Args:
            config: fields of its `moezoo_config` that change no shape take effect.
            dtype: a dtype, or "auto" for the stored one (the default).
            device_map: a device for all of the model.
            kwargs: other arguments of transformers' method, which do not matter here.
        """
        del model_args
        dtype = kwargs.get("torch_dtype") if dtype is None else dtype
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        device = device_map.get("") if isinstance(device_map, Mapping) else device_map
        overrides = {} if config is None else dict(config.moezoo_config or {})
        path = Path(pretrained_model_name_or_path)
        model = load(
            path,
            task=cls.task,
            dtype=dtype,
            device=None if device == "auto" else device,
            **overrides,
        )
        made = cls.wrap(model)
        if kwargs.get("output_loading_info"):
            return made, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return made

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write weights and configs into a directory, which other files may share.

        Args:
            state_dict: weights to write instead of the model's own, by the same names.
            kwargs: other arguments of transformers' method, which do not matter here.
        """
        if not is_main_process:
            return
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
            stage = Path(folder) / "model"
            model = self.model if state_dict is None else self._holding(state_dict)
            save(model, stage, layout="moezoo", max_shard_size=max_shard_size)
            self.config.architectures = [type(self).__name__]
            self.config.dtype = self.dtype
            self.config.save_pretrained(stage)
            if self.can_generate() and self.generation_config is not None:
                self.generation_config.save_pretrained(stage)
            for stale in target.glob("model*.safetensors*"):
                stale.unlink()
            for file in stage.iterdir():
                os.replace(file, target / file.name)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `Module.load_state_dict`, by the names in memory or by those of a saved file."""
        if any(".block." in name for name in state_dict) or "shared.weight" in state_dict:
            state_dict = in_memory(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        shared: nn.Module = self.model.shared
        return shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.model.shared = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: the vocabulary is a part of the config. Raises ConfigError."""
        hint = "Build the model with the vocabulary that it is to have."
        raise ConfigError("the vocabulary cannot be resized", field="vocab_size", hint=hint)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in backward."""
        return bool(self.model.encoder.gradient_checkpointing)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        self.model.gradient_checkpointing(enable)

    def _init_weights(self, module: nn.Module) -> None:
        """moezoo.build has drawn them."""

    def _holding(self, state_dict: Mapping[str, Tensor]) -> nn.Module:
        """A model that holds the given weights instead of its own."""
        twin = build(self.config.switch, task=self.task, device="meta")
        own = {name.removeprefix(_INNER): tensor for name, tensor in state_dict.items()}
        twin.load_state_dict(own, strict=True, assign=True)
        return twin


def in_memory(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a saved file by the names of a wrapped model, experts stacked."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state_dict.items():
        if is_ignored(name):
            continue
        place = memory_name(name)
        if place.expert is None:
            whole[_INNER + place.name] = tensor
        else:
            parts.setdefault(_INNER + place.name, {})[place.expert] = tensor
    for name, experts in parts.items():
        missing = next((e for e in range(len(experts)) if e not in experts), None)
        if missing is not None:
            raise TensorMismatch(f"{name}: expert {missing} is missing", key=name)
        whole[name] = torch.stack([experts[e] for e in range(len(experts))])
    return whole
