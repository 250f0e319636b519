"""The config of a wrapped model: the fields of a SwitchConfig by their names, as transformers has
T5's.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from moezoo.adapters.checkpoint_source import task_of
from moezoo.adapters.description import describe
from moezoo.adapters.families.fields import eos_value
from moezoo.adapters.families.native import FORMAT
from moezoo.adapters.formats import open_source
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError

FIELDS = tuple(f.name for f in dataclasses.fields(SwitchConfig) if f.name != "other_fields")


class MoezooConfig(PreTrainedConfig):  # type: ignore[misc]
    """What `config.json` of a moezoo checkpoint holds.

    Every field of SwitchConfig is an attribute, and what an attribute says is what a model is built
    from; T5's other names (`hidden_size`, ...) mean the same attributes. `label_smoothing` is what
    training spreads of every target over all tokens. A field that is not given
    is that of `moezoo_config` (a SwitchConfig as plain values), and else SwitchConfig's default.
    Raises ConfigError naming a bad field.
    """

    model_type = "moezoo"
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",  # its name before transformers 5.24
        "encoder_last_hidden_state",
        "aux_loss",
        "encoder_router_logits",
        "decoder_router_logits",
    ]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: Any = None
    d_model: Any = None
    d_kv: Any = None
    d_ff: Any = None
    num_layers: Any = None
    num_decoder_layers: Any = None
    num_heads: Any = None
    num_experts: Any = None
    encoder_sparse_layers: Any = None
    decoder_sparse_layers: Any = None
    feed_forward_proj: Any = None
    relative_attention_num_buckets: Any = None
    relative_attention_max_distance: Any = None
    position_bias_every_layer: Any = None
    dropout_rate: Any = None
    layer_norm_epsilon: Any = None
    initializer_factor: Any = None
    initializer_scale: Any = None
    tie_word_embeddings: Any = None
    own_embeddings: Any = None
    scale_decoder_outputs: Any = None
    router: Any = None
    router_bias: Any = None
    capacity: Any = None
    experts: Any = None
    shared_expert: Any = None
    router_losses: Any = None
    group: Any = None
    allow_noncausal: Any = None
    wo_scale: Any = None
    pad_token_id: Any = None
    eos_token_id: Any = None
    decoder_start_token_id: Any = None
    expert_capacity: Any = None
    is_encoder_decoder: bool = True
    use_cache: bool = True
    output_router_logits: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("moezoo_format", None)
        stored = dict(kwargs.pop("moezoo_config", None) or {})
        kwargs = {**stored.pop("other_fields", {}), **kwargs}
        said = {n: getattr(self, n) for n in FIELDS if getattr(self, n) is not None}
        # Fields alone are a new config; what was stored may be of before a field was there.
        switch = SwitchConfig.from_dict({**stored, **said}) if stored else SwitchConfig(**said)
        super().__post_init__(**kwargs)
        values = switch.to_dict()
        for name in FIELDS:
            setattr(self, name, values[name])
        self.eos_token_id = eos_value(switch)
        self.num_decoder_layers = switch.decoder_layers

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of a config.json; a directory of T5 or Switch is described by its config and
        its weights, as `moezoo.load` reads them.
        """
        place = Path(pretrained_model_name_or_path) / kwargs.get("subfolder", "")
        if place.is_dir() and not (place / "config.json").is_file():
            return _described(place), kwargs
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type", cls.model_type) == cls.model_type:
            return values, kwargs
        if not place.is_dir():
            hint = "Download it first: hf download NAME --local-dir DIRECTORY."
            found = f"a {values['model_type']} model that is no local directory"
            raise ConfigError("cannot be read", field="model_type", found=found, hint=hint)
        return _described(place), kwargs

    @classmethod
    def of(cls, switch: SwitchConfig, *, task: str = "conditional_generation") -> MoezooConfig:
        """The config of a moezoo model of a task."""
        values = switch.to_dict()
        other = {n: v for n, v in values.pop("other_fields").items() if n not in FIELDS}
        return cls(**{**other, "moezoo_config": values, "is_encoder_decoder": task != "encoder"})

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> MoezooConfig:
        """This config; for the decoder alone (as caches ask) with its number of layers."""
        if not decoder or encoder or self.num_layers == self.num_decoder_layers:
            return self
        found = copy.deepcopy(self)
        found.num_layers = self.num_decoder_layers
        return found

    @property
    def switch(self) -> SwitchConfig:
        """The SwitchConfig that the attributes say. Raises ConfigError naming a bad one."""
        values = {name: getattr(self, name) for name in FIELDS}
        if values["eos_token_id"] is None:
            values["eos_token_id"] = ()
        return SwitchConfig.from_dict(values)

    @property
    def moezoo_config(self) -> dict[str, Any]:
        """`switch` as plain values."""
        values = self.switch.to_dict()
        values.pop("other_fields")
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the SwitchConfig whole as `moezoo_config`, for `moezoo.load`."""
        told = {"moezoo_format": FORMAT, "moezoo_config": self.moezoo_config}
        values: dict[str, Any] = super().to_dict()
        return {**values, **told}


def _described(directory: Path) -> dict[str, Any]:
    with open_source(directory) as source:
        description = describe(source)
    config = MoezooConfig.of(description.config, task=task_of(description))
    stored = {n: v for n, v in description.values.items() if n in ("dtype", "torch_dtype")}
    return {**config.to_dict(), **stored}
