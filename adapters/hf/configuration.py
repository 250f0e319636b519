"""The config of a wrapped model: transformers' fields around a SwitchConfig."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from moezoo.adapters.families.base import eos_value
from moezoo.adapters.families.native import FORMAT, NativeFamily
from moezoo.config import SwitchConfig

_REPEATED = ("vocab_size", "pad_token_id", "decoder_start_token_id")


class MoezooConfig(PreTrainedConfig):  # type: ignore[misc]
    """What `config.json` of a moezoo checkpoint holds.

    `moezoo_config` is the SwitchConfig as plain values and decides everything; the fields that
    transformers looks for (ids of special tokens, sizes) are read from it.
    """

    model_type = "moezoo"
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state", "aux_loss"]

    moezoo_format: int = FORMAT
    moezoo_config: dict[str, Any] | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = True
    vocab_size: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        switch = SwitchConfig.from_dict(self.moezoo_config or {})
        self.moezoo_config = switch.to_dict()
        for name in _REPEATED:
            setattr(self, name, getattr(switch, name))
        self.eos_token_id = eos_value(switch)
        # The wrapped model shares its own weights; transformers has nothing to tie.
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, switch: SwitchConfig, *, task: str = "conditional_generation") -> MoezooConfig:
        """The config of a moezoo model of a task."""
        values = NativeFamily().write(switch, task)
        values.pop("model_type")
        return cls(**values)

    @property
    def switch(self) -> SwitchConfig:
        """The SwitchConfig that the model is built from."""
        return SwitchConfig.from_dict(self.moezoo_config or {})

    @property
    def hidden_size(self) -> int:
        return self.switch.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.switch.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.switch.num_heads
