"""Whether the attention around a plugged layer sees later tokens: then its router may too."""

from __future__ import annotations

from torch import nn

from moezoo.errors import ConfigError
from moezoo.layer import MoE
from moezoo.pairing import check_causal


def check_plugged(model: nn.Module, name: str, new: nn.Module, causal: bool | None) -> None:
    """Refuse experts that would let a token see later ones in a decoder.

    Args:
        causal: True for a decoder, False for a model whose tokens may see each other, None: what
            the modules around the layer `name` say of themselves.

    Raises ConfigError, also where they say nothing and the router needs to know.
    """
    for layer in (module for module in new.modules() if isinstance(module, MoE)):
        if causal is False:
            return
        try:
            check_causal(layer.router, layer.capacity)
        except ConfigError as refusal:
            said = True if causal else _said(model, name)
            if said is False:
                continue
            if said:
                raise ConfigError(f"{name!r} is in a decoder: {refusal}", field="make") from None
            hint = "Pass causal=False to plug if its tokens may see each other, causal=True if not."
            kind = type(layer.router).__name__
            reason = f"a {kind} lets tokens see later ones, and {name!r} may be in a decoder"
            raise ConfigError(reason, field="causal", hint=hint) from None


def _said(model: nn.Module, name: str) -> bool | None:
    """What the innermost module around `name` that says something says; a decoder, if any is."""
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        if isinstance(around, (nn.TransformerDecoderLayer, nn.TransformerDecoder)):
            return True
        flags = [
            flag
            for module in around.modules()
            for flag in (getattr(module, "is_causal", None), getattr(module, "is_decoder", None))
            if isinstance(flag, bool)
        ]
        if flags:
            return any(flags)
    return None
