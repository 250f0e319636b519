"""What config.json of the family means, field by field, and what is written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moezoo
from moezoo.adapters.families import family_of
from moezoo.adapters.families.base import Weights
from tests.models.tiny import tiny

SIZES = {"vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 2}


def read(*, own_head: bool = False, **fields: Any) -> moezoo.SwitchConfig:
    """The config that a config.json of small sizes and these fields means; None leaves one out."""
    values = {"model_type": "t5", **SIZES, **fields}
    names = frozenset({"decoder.block.0.layer.0.layer_norm.weight"})
    return family_of(values).read(values, Weights(names, own_head))


@pytest.mark.parametrize(
    ("eos", "ids", "written"), [(2, (2,), 2), ([2, 5], (2, 5), [2, 5]), ([3], (3,), [3])]
)
@pytest.mark.parametrize("layout", ["auto", "moezoo"])
def test_every_end_of_sequence_is_kept_from_file_to_file(
    eos: Any, ids: tuple[int, ...], written: Any, layout: str, tmp_path: Path
) -> None:
    config = read(eos_token_id=eos)
    assert config.eos_token_ids == ids
    assert moezoo.SwitchConfig.from_json(config.to_json()) == config
    moezoo.save(tiny(eos_token_id=config.eos_token_id), tmp_path / "out", layout=layout)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values.get("moezoo_config", values).get("eos_token_id", written) == written
    assert moezoo.load(tmp_path / "out").config.eos_token_ids == ids


def test_a_null_end_of_sequence_ends_none() -> None:
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read().eos_token_ids == (1,), "T5's, where the file is silent"


@pytest.mark.parametrize("eos", [True, "1", [1, 61], [True], [[1]], -1, 1.0])
def test_an_end_of_sequence_that_is_no_id_is_refused(eos: Any) -> None:
    with pytest.raises(moezoo.MoezooError, match="eos_token_id"):
        read(eos_token_id=eos)
