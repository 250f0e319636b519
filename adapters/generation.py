"""generation_config.json: what a checkpoint says about generating, kept whole. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo.adapters.families.fields import eos_value
from moezoo.adapters.formats.files import read_json
from moezoo.config import SwitchConfig
from moezoo.generation_options import OPTIONS, UNFOLLOWED, StoredGeneration

NAME = "generation_config.json"
_MOST_BYTES = 1 << 20
_OF_THE_CONFIG = ("decoder_start_token_id", "eos_token_id", "pad_token_id", "use_cache")


def read_generation(directory: Path, config: Mapping[str, Any]) -> StoredGeneration:
    """The fields of a directory's generation_config.json; where there is none, those of its
    config.json (given as values), which is where older files have them and transformers 5 reads
    them.

    Raises CorruptFile.
    """
    path = directory / NAME
    if os.path.lexists(path):
        return StoredGeneration.of(read_json(path, most=_MOST_BYTES))
    names = (OPTIONS.keys() | UNFOLLOWED.keys()) - set(_OF_THE_CONFIG)
    return StoredGeneration.of({n: v for n, v in config.items() if n in names and v is not None})


def written_generation(config: SwitchConfig, stored: StoredGeneration) -> dict[str, Any]:
    """What a generation_config.json holds: special ids, without which transformers cannot start or
    end, and all that was stored.
    """
    ids = {
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": eos_value(config),
        "pad_token_id": config.pad_token_id,
    }
    return {**ids, **stored.values}
