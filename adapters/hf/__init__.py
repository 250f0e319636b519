"""moezoo models as models of Hugging Face transformers, and experts for its own sparse models.

To import it adds "moezoo" to what `experts_implementation` may be.
"""

from __future__ import annotations

from importlib import import_module

from moezoo.errors import MissingExtra

try:
    import transformers  # noqa: F401  # what everything below is about
except ImportError:
    raise MissingExtra("moezoo.adapters.hf", "transformers", extra="hf") from None

from moezoo.adapters.hf.adaptation import AdaptRouters
from moezoo.adapters.hf.configuration import MoezooConfig
from moezoo.adapters.hf.experts import register_experts
from moezoo.adapters.hf.modeling import (
    MoezooEncoderModel,
    MoezooForConditionalGeneration,
    MoezooModel,
)
from moezoo.adapters.hf.routers import sparse_layers


def register() -> None:
    """Tell transformers what `model_type: moezoo` is, to its Auto classes and pipelines, and what
    `experts_implementation="moezoo"` is; may be called again.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

    register_experts()
    AutoConfig.register("moezoo", MoezooConfig, exist_ok=True)
    # One model type, two classes without a head: `architectures` in config.json tells which.
    AutoModel.register(MoezooConfig, (MoezooModel, MoezooEncoderModel), exist_ok=True)
    AutoModelForSeq2SeqLM.register(MoezooConfig, MoezooForConditionalGeneration, exist_ok=True)
    for kind in (MoezooModel, MoezooEncoderModel, MoezooForConditionalGeneration):
        setattr(import_module("transformers"), kind.__name__, kind)  # pipelines look there


register_experts()

__all__ = [
    "AdaptRouters",
    "MoezooConfig",
    "MoezooEncoderModel",
    "MoezooForConditionalGeneration",
    "MoezooModel",
    "sparse_layers",
    "register",
]
