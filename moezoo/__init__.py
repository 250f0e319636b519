"""moezoo: mixture of experts for T5 and transformers of your own, after Switch Transformers.

The paper is arXiv 2101.03961. Every name is imported on first use, so `import moezoo` loads neither
torch nor numpy.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `adapters` lies inside this package: installed as a folder, in a checkout as a link, which type
# checkers follow too. Where a system checks no links out, it is found beside the package.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "adapters").is_dir() and (_HERE.parent / "adapters" / "__init__.py").is_file():
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from moezoo import capacity, experts, losses, routers
    from moezoo.adapters.checkpoint import load, save
    from moezoo.adapters.plug import plug
    from moezoo.adapters.record import record
    from moezoo.adapters.sparse import sparse
    from moezoo.adapters.upcycle import downcycle as downcycle
    from moezoo.adapters.upcycle import upcycle as upcycle
    from moezoo.building import build
    from moezoo.config import SwitchConfig
    from moezoo.errors import MoezooError
    from moezoo.layer import MoE
    from moezoo.models import SwitchEncoderModel, SwitchForConditionalGeneration, SwitchModel
    from moezoo.models.resizing import resize_embeddings
    from moezoo.presets import list_models
    from moezoo.quantization import quantize
    from moezoo.reporting.report import report
    from moezoo.sparse_mlp import SparseMLP
    from moezoo.tokenizer import ByteTokenizer, Tokenizer

_HOME = {
    "ByteTokenizer": "moezoo.tokenizer",
    "MoE": "moezoo.layer",
    "MoezooError": "moezoo.errors",
    "SparseMLP": "moezoo.sparse_mlp",
    "SwitchConfig": "moezoo.config",
    "SwitchEncoderModel": "moezoo.models",
    "SwitchForConditionalGeneration": "moezoo.models",
    "SwitchModel": "moezoo.models",
    "Tokenizer": "moezoo.tokenizer",
    "build": "moezoo.building",
    "downcycle": "moezoo.adapters.upcycle",
    "list_models": "moezoo.presets",
    "load": "moezoo.adapters.checkpoint",
    "plug": "moezoo.adapters.plug",
    "quantize": "moezoo.quantization",
    "record": "moezoo.adapters.record",
    "report": "moezoo.reporting.report",
    "resize_embeddings": "moezoo.models.resizing",
    "save": "moezoo.adapters.checkpoint",
    "sparse": "moezoo.adapters.sparse",
    "upcycle": "moezoo.adapters.upcycle",
}
_REGISTRIES = ("capacity", "experts", "losses", "routers")

__all__ = [
    "ByteTokenizer",
    "MoE",
    "MoezooError",
    "SparseMLP",
    "SwitchConfig",
    "SwitchEncoderModel",
    "SwitchForConditionalGeneration",
    "SwitchModel",
    "Tokenizer",
    "build",
    "capacity",
    "downcycle",
    "experts",
    "list_models",
    "load",
    "losses",
    "plug",
    "quantize",
    "record",
    "report",
    "resize_embeddings",
    "routers",
    "save",
    "sparse",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name in _REGISTRIES:
        return importlib.import_module(f"moezoo.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'moezoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
