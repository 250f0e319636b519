"""What a dense checkpoint holds beside the tensors that are converted, remembered in the provenance
so that `downcycle` writes it again: other names for a table, copies, strays. No torch here.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.families import DecoderConfig
from moezoo.adapters.families.decoders import EMBEDDINGS
from moezoo.adapters.formats.base import DTYPE_BITS
from moezoo.adapters.names import HEAD, LM_HEADS, MAY_REPEAT, SHARED
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.errors import ConfigError

# Of one stray tensor: config.json keeps it whole, and T5-11b's has 16 KiB.
_MOST_BYTES = 1 << 16
_FIELDS = ("aliases", "dropped_heads", "renamed", "strays")


def left_behind(checkpoint: CheckpointSource) -> dict[str, Any]:
    """What provenance says of what was not converted, or not under its own name; nothing where
    there is nothing of the kind. Raises CheckpointError for a file that cannot be read.

    aliases: names that repeat a tensor, and which one; renamed: tensors as they are written, and
    what the file calls them; strays: dtype, shape and bytes (base64) of what never meant anything;
    dropped_heads: names alone.
    """
    found = {
        "aliases": dict(sorted(checkpoint.aliases.items())),
        "dropped_heads": sorted(checkpoint.description.dropped),
        "renamed": checkpoint.renamed,
        "strays": _strays(checkpoint),
    }
    return {name: value for name, value in found.items() if value}


def known(checkpoint: CheckpointSource) -> dict[str, Any]:
    """What the provenance of a made checkpoint says of the kind, as it is."""
    made = checkpoint.description.values.get("moezoo_provenance")
    made = made if isinstance(made, Mapping) else {}
    return {name: made[name] for name in _FIELDS if name in made}


def known_aliases(checkpoint: CheckpointSource) -> dict[str, str]:
    """Names under which the dense source held a tensor once more. Raises ConfigError."""
    found = known(checkpoint).get("aliases", {})
    decoder = isinstance(checkpoint.config, DecoderConfig)
    names, firsts = (
        ((HEAD,), (EMBEDDINGS,)) if decoder else ((*MAY_REPEAT, *LM_HEADS), (SHARED, HEAD))
    )
    tables = isinstance(found, Mapping) and set(found) <= set(names)
    if not tables or not all(first in firsts for first in found.values()):
        raise _malformed(checkpoint, "aliases", "names no aliases of the family", found)
    return dict(found)


def known_names(checkpoint: CheckpointSource) -> dict[str, str]:
    """Tensors as they are written, and what the dense source called them. Raises ConfigError."""
    found = known(checkpoint).get("renamed", {})
    tables = isinstance(found, Mapping) and set(found) <= {SHARED, HEAD}
    if not tables or not all(name in (*MAY_REPEAT, *LM_HEADS) for name in found.values()):
        raise _malformed(checkpoint, "renamed", "names no tables of the family", found)
    return dict(found)


def known_strays(checkpoint: CheckpointSource) -> dict[str, tuple[TensorPlan, bytes]]:
    """The stray tensors of the dense source, with their bytes. Raises ConfigError."""
    found = known(checkpoint).get("strays", {})
    strays = {}
    for name, entry in found.items() if isinstance(found, Mapping) else [("", found)]:
        try:
            dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
            content = base64.b64decode(entry["base64"], validate=True)
            fits = math.prod(shape) * DTYPE_BITS[dtype] == 8 * len(content)
            fits = fits and min(shape, default=0) >= 0
        except (KeyError, TypeError, ValueError, binascii.Error):
            fits = False
        if not fits or not checkpoint.description.family.is_stray(name):
            raise _malformed(checkpoint, "strays", "holds no stray tensors of the family", found)
        strays[name] = TensorPlan(name, dtype, shape), content
    return strays


def _strays(checkpoint: CheckpointSource) -> dict[str, Any]:
    source, start = checkpoint.source, checkpoint.description.prefix
    found = {}
    for full, info in source.tensors.items():
        name = full.removeprefix(start)
        if checkpoint.description.family.is_stray(name) and info.nbytes <= _MOST_BYTES:
            content = base64.b64encode(source.read(full)).decode("ascii")
            found[name] = {"dtype": info.dtype, "shape": list(info.shape), "base64": content}
    return found


def _malformed(checkpoint: CheckpointSource, field: str, what: str, found: object) -> ConfigError:
    return ConfigError(
        f"moezoo_provenance.{field} {what}",
        field=field,
        path=checkpoint.source.directory / "config.json",
        found=repr(found)[:80],
    )
