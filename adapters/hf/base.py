"""What every wrapped model shares: building, loading, saving, its parts by T5's names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from moezoo.adapters.checkpoint import load
from moezoo.adapters.hf.configuration import MoezooConfig
from moezoo.adapters.hf.drawing import draw
from moezoo.adapters.hf.naming import INNER, in_memory, register_names
from moezoo.adapters.hf.stacks import opened, twin
from moezoo.adapters.hf.targets import register_targets
from moezoo.adapters.names import HEAD, MAY_REPEAT, SHARED
from moezoo.building import TASKS, build
from moezoo.errors import ConfigError
from moezoo.models import SwitchForConditionalGeneration
from moezoo.models.resizing import check_routers

register_names(MoezooConfig.model_type)
register_targets(MoezooConfig.model_type)
_PARTS = ("encoder", "decoder", "shared", "lm_head")


class MoezooPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """A moezoo model of one task as `self.model`, whose parts are there by T5's names, too.

    Files are in moezoo's own layout: `moezoo.load` reads what `save_pretrained` writes, and
    `from_pretrained` reads directories of moezoo, T5 and Switch.
    """

    config_class = MoezooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    task = ""
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [
        r"^(model\.)?(encoder|decoder)\.embed_tokens\.weight$",  # a copy of the shared ones
        r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    ]

    def __init__(self, config: MoezooConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        inner = build(config.switch, task=self.task) if model is None else twin(model)
        self.model: Any = opened(inner, self.config)
        if model is not None:
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()
        if not self.shared.weight.is_meta:
            self.tie_weights()

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
        made.config.dtype = made.dtype
        if isinstance(model, SwitchForConditionalGeneration):
            made.generation_config.update(allow_custom_entries=True, **model.generation.values)
        return made

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a directory of moezoo, T5 or Switch weights, in evaluation mode.

        Every argument is that of transformers' method. Fields of the config, `capacity` and the
        other ones of SwitchConfig included, are arguments too.
        """
        path = pretrained_model_name_or_path
        if path is not None and Path(path).is_file():  # weights by themselves, whose shapes tell
            model: Any = load(Path(path), task=cls.task)
            config = MoezooConfig.of(model.config, task=cls.task) if config is None else config
            kwargs["state_dict"] = {INNER + n: tensor for n, tensor in model.state_dict().items()}
            path = None
        found = super().from_pretrained(path, *model_args, config=config, **kwargs)
        made = found[0] if isinstance(found, tuple) else found
        if path is not None and made.can_generate():
            made.follow_generation(Path(path) / kwargs.get("subfolder", ""))
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `Module.load_state_dict`, by the names in memory or by those of a saved file."""
        if any(".block." in name for name in state_dict) or SHARED in state_dict:
            state_dict = self._without_repeats(in_memory(state_dict))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def encoder(self) -> Any:
        """The encoder: a stack that takes ids, as T5's."""
        return self.model.encoder

    @property
    def shared(self) -> Any:
        """The embeddings that both stacks look up, unless they have their own."""
        return self.model.shared

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a second module by the name of a part.
        if name in _PARTS and isinstance(value, nn.Module):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings that the encoder looks up: the shared ones, or its own."""
        table: nn.Module = self.encoder.get_input_embeddings()
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
        """As transformers' method, of every table of tokens and the head.

        Raises ConfigError for routers that know the vocabulary.
        """
        check_routers(self.model)
        table: nn.Embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        rows = table.weight.shape[0]
        others = {self.model.shared, getattr(self.model, "decoder", self.encoder).embed_tokens}
        for other in others - {table, None}:
            self._get_resized_embeddings(other, rows, mean_resizing=mean_resizing)
        self.config.vocab_size = rows
        self.model.config = self.model.config.replace(vocab_size=rows)
        return table

    @property
    def recomputes(self) -> bool:
        """Whether blocks are recomputed in backward."""
        return any(block.gradient_checkpointing for block in self.encoder.blocks)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **options: Any
    ) -> None:
        # Routings leave a block beside its output: the reentrant way would cut their gradient.
        run = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, run, **options)

    def _init_weights(self, module: nn.Module) -> None:
        draw(module)

    def _without_repeats(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors without those that repeat the shared embeddings, for which there is no place; and
        with the tied head, which a file has not.
        """
        own, shared = self.model.state_dict(), state.get(INNER + SHARED)
        if self.config.tie_word_embeddings and shared is not None and HEAD in own:
            state = {**state, INNER + HEAD: shared}
        return {
            name: tensor
            for name, tensor in state.items()
            if (plain := name.removeprefix(INNER)) not in MAY_REPEAT
            or plain in own
            or shared is None
            or not torch.equal(tensor, shared)
        }
