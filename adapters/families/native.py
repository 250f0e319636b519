"""moezoo's own layout: Hugging Face's names, extended where they have no word."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moezoo.adapters.families.base import TASK_SUFFIX, Family, Weights, registry
from moezoo.adapters.families.fields import other_fields
from moezoo.adapters.names import SWITCH
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError

FORMAT = 1
_FIELDS = {field.name for field in dataclasses.fields(SwitchConfig)} - {"other_fields"}


@registry.register("moezoo")
class NativeFamily(Family):
    """Every SwitchConfig as it is: gated experts, free placement, any router, policy, container."""

    model_types = ("moezoo",)
    mlp = SWITCH

    def read(self, values: Mapping[str, Any], weights: Weights) -> SwitchConfig:
        version = values.get("moezoo_format", FORMAT)
        if isinstance(version, bool) or not isinstance(version, int) or version > FORMAT:
            hint = "Update moezoo."
            raise ConfigError(
                "written by a newer moezoo",
                field="moezoo_format",
                expected=FORMAT,
                found=version,
                hint=hint,
            )
        inner = values.get("moezoo_config")
        if not isinstance(inner, dict):
            raise ConfigError("config.json has no object 'moezoo_config'", field="moezoo_config")
        # The wrapper for transformers writes the fields by themselves too; who edits one means it.
        said = {n: v for n, v in values.items() if n in _FIELDS and v is not None}
        other = {n: v for n, v in other_fields(values).items() if n not in _FIELDS}
        return SwitchConfig.from_dict({"other_fields": other, **inner, **said})

    def write(self, config: SwitchConfig, task: str) -> dict[str, Any]:
        inner = config.to_dict()
        return {
            **inner.pop("other_fields"),
            "model_type": "moezoo",
            "moezoo_format": FORMAT,
            "architectures": ["Moezoo" + TASK_SUFFIX[task]],
            "is_encoder_decoder": task != "encoder",
            "moezoo_config": inner,
        }

    def refusal(self, config: SwitchConfig) -> str | None:
        return None
