"""The published family by name: plain data, no torch."""

from __future__ import annotations

import fnmatch

from moezoo.config import SwitchConfig
from moezoo.errors import RegistryError, did_you_mean

_SWITCH_BASE = SwitchConfig(num_experts=8)
_SWITCH_LARGE = _SWITCH_BASE.replace(d_model=1024, d_ff=4096, num_heads=16, num_layers=24)
_T5_SIZES = {
    "small": {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6},
    "base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_layers": 24},
    "3b": {"d_model": 1024, "d_ff": 16384, "num_heads": 32, "num_layers": 24, "d_kv": 128},
    "11b": {"d_model": 1024, "d_ff": 65536, "num_heads": 128, "num_layers": 24, "d_kv": 128},
}
_V1_1_SIZES = {
    "small": {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": 8},
    "base": {"d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 24},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24},
}
_BYT5_SIZES = {
    "small": {"d_model": 1472, "d_ff": 3584, "num_heads": 6, "num_layers": 12},
    "base": {"d_model": 1536, "d_ff": 3968, "num_heads": 12, "num_layers": 18},
    "large": {"d_model": 1536, "d_ff": 3840, "num_heads": 16, "num_layers": 36},
    "xl": {"d_model": 2560, "d_ff": 6720, "num_heads": 32, "num_layers": 36},
    "xxl": {"d_model": 4672, "d_ff": 12352, "num_heads": 64, "num_layers": 36},
}
_BYT5_DECODERS = {"small": 4, "base": 6, "large": 12, "xl": 12, "xxl": 12}
_GATED = SwitchConfig(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def _presets() -> dict[str, SwitchConfig]:
    presets = {f"switch-base-{e}": _SWITCH_BASE.replace(num_experts=e) for e in _BASE_EXPERTS}
    presets["switch-large-128"] = _SWITCH_LARGE.replace(num_experts=128)
    presets["switch-xxl-128"] = _GATED.replace(
        d_model=4096,
        d_ff=10240,
        num_heads=64,
        num_layers=24,
        num_experts=128,
    )
    presets["switch-c-2048"] = SwitchConfig(
        d_model=2080,
        d_ff=6144,
        num_heads=30,
        num_layers=15,
        num_experts=2048,
        tie_word_embeddings=False,
        encoder_sparse_layers="all",
        decoder_sparse_layers="all",
        capacity={"name": "switch", "factor": 1.0},
    )
    for size, fields in _T5_SIZES.items():
        presets[f"t5-{size}"] = SwitchConfig().replace(**fields)
    for size, fields in _V1_1_SIZES.items():
        gated = _GATED.replace(**fields)
        presets[f"t5-v1.1-{size}"] = presets[f"flan-t5-{size}"] = gated
        presets[f"mt5-{size}"] = gated.replace(vocab_size=250112)
        if size != "large":  # never published
            umt5 = {"vocab_size": 256384, "position_bias_every_layer": True}
            presets[f"umt5-{size}"] = gated.replace(**umt5)
    for size, fields in _BYT5_SIZES.items():
        byt5 = _GATED.replace(**fields).replace(vocab_size=384)
        presets[f"byt5-{size}"] = byt5.replace(num_decoder_layers=_BYT5_DECODERS[size])
    return presets


_BASE_EXPERTS = (8, 16, 32, 64, 128, 256)


def list_models(pattern: str = "*") -> list[str]:
    """Names of presets that match a shell pattern such as `switch-*`, family by family."""
    matching = fnmatch.filter(_presets(), _spelled(pattern))
    return sorted(matching, key=lambda name: name.rstrip("0123456789").rpartition("-")[0] or name)


def preset(name: str) -> SwitchConfig:
    """The config of a preset. Raises RegistryError naming the nearest.

    In evaluation no token is dropped, as everywhere in moezoo; the published models were evaluated
    with capacity factor 2.0 (xxl: 4.0): `capacity={"name": "switch", "eval_factor": 2.0}`.
    """
    presets = _presets()
    if not isinstance(name, str) or _spelled(name) not in presets:
        raise RegistryError(f"unknown model {name!r}", hint=did_you_mean(name, presets))
    return presets[_spelled(name)]


def _spelled(name: str) -> str:
    """The hub writes t5-v1_1-base where the paper writes t5.1.1 and everybody else T5 v1.1."""
    return name.replace("v1_1", "v1.1")
