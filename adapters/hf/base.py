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
from moezoo.adapters.names import MAY_REPEAT, SHARED, is_stray, memory_name
from moezoo.building import TASKS, build
from moezoo.errors import ConfigError, TensorMismatch
from moezoo.models import SwitchForConditionalGeneration
from moezoo.models.resizing import resize_embeddings

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
        made = cls(MoezooConfig.of(switch, task=cls.task), model).train(model.training)
        if isinstance(model, SwitchForConditionalGeneration):
            made.generation_config.update(allow_custom_entries=True, **model.generation.values)
        return made

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
            state_dict = self._without_repeats(in_memory(state_dict))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings that the encoder looks up: the shared ones, or its own."""
        table: nn.Module = self.model.encoder.table(self.model.shared)
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings that the encoder looks up."""
        if self.model.encoder.embed_tokens is None:
            self.model.shared = value
        else:
            self.model.encoder.embed_tokens = value

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give every table of tokens and the head `new_num_tokens` rows (rounded up to a multiple
        of `pad_to_multiple_of`); see `moezoo.resize_embeddings`.

        Raises ConfigError for `mean_resizing=False`: new rows are the mean of the old ones.
        """
        if not mean_resizing:
            hint = "Leave mean_resizing out, and draw the new rows afterwards."
            raise ConfigError("new rows are means", field="mean_resizing", found=False, hint=hint)
        rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        resize_embeddings(self.model, rows)
        self.config.vocab_size = rows
        self.config.moezoo_config = self.model.config.to_dict()
        return self.get_input_embeddings()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in backward."""
        return bool(self.model.encoder.gradient_checkpointing)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        self.model.gradient_checkpointing(enable)

    def _init_weights(self, module: nn.Module) -> None:
        """moezoo.build has drawn them."""

    def _without_repeats(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors without those that repeat the shared embeddings, for which there is no place."""
        own, shared = self.model.state_dict(), state.get(_INNER + SHARED)
        return {
            name: tensor
            for name, tensor in state.items()
            if (plain := name.removeprefix(_INNER)) not in MAY_REPEAT
            or plain in own
            or shared is None
            or not torch.equal(tensor, shared)
        }

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
        if is_stray(name):
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
