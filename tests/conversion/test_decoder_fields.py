"""Every field that a config.json may hold is carried or refused, whatever it says: the sibling
computes what transformers makes of the dense file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moezoo.adapters.upcycle import upcycle
from moezoo.errors import MoezooError
from tests.conversion.decoders import FAMILIES, dense_decoder, edit_config, ids, loaded, relative

_PLAIN = [family for family in FAMILIES if "," not in family]
_ROPE = {"rope_theta": 777.0, "rope_type": "default"}
_LONG = {"rope_theta": 777.0, "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3,
         "original_max_position_embeddings": 16}  # fmt: skip
_OLD = dict.fromkeys(("rope_parameters", "transformers_version"), ...)
# What files say in ways that no class writes: of both ages at once, null, of other classes.
ODD: dict[str, dict[str, Any]] = {
    "scaling beside RoPE": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "scaling that says nothing": {"rope_scaling": {"type": "default"}},
    "scaling with a base": {"rope_scaling": {**_ROPE, "rope_type": "linear", "factor": 3.0}},
    "old scaling": {**_OLD, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "old scaling and base": {**_OLD, "rope_scaling": {**_LONG}, "rope_theta": 99},
    "RoPE that is null": {**_OLD, "rope_parameters": None, "rope_theta": None},
    "a null beside RoPE": {"rope_theta": None, "rope_scaling": None},
    "RoPE by kind": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "scaled by kind": {"rope_parameters": {"full_attention": _LONG, "sliding_attention": None}},
    "one RoPE": {"rope_parameters": _LONG},
    "wider heads": {"head_dim": 8},
    "heads that are null": {"head_dim": None, "num_key_value_heads": None},
    "windows without a width": {"use_sliding_window": True, "sliding_window": None},
    "windows that are not used": {"use_sliding_window": False, "sliding_window": 3},
    "experts in a dense file": {"num_experts": 4, "num_experts_per_tok": 3, "n_group": 2,
                                "norm_topk_prob": False, "routed_scaling_factor": 2.0,
                                "moe_intermediate_size": 5, "first_k_dense_replace": 1},
    "factors of others": {"logits_scaling": 3.0, "embedding_multiplier": 3.0, "logit_scale": 2.0,
                          "residual_multiplier": 0.3, "final_logit_softcapping": 1.0},
    "norms of others": {"layer_norm_eps": 0.1, "norm_eps": 0.2, "layer_norm_epsilon": 0.3},
}  # fmt: skip
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "model_type", "dtype", "use_cache")


@pytest.fixture(scope="module", params=_PLAIN)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_decoder(tmp_path_factory.mktemp("dense") / request.param, request.param)


def carried(dense: Path, folder: Path, **fields: Any) -> str:
    """Whether the sibling "agrees" with a dense file of these fields, or the line that refuses it;
    "" where transformers cannot run it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dense, folder / "dense")
    edit_config(folder / "dense", **fields)
    try:
        _refill(folder / "dense")
        expected = loaded(folder / "dense")(ids()).logits
        assert torch.isfinite(expected).all()
    except Exception:  # of any kind, from any part of transformers
        return ""
    try:
        upcycle(folder / "dense", folder / "moe", num_experts=2)
    except MoezooError as error:
        assert not (folder / "moe").exists()
        return str(error)
    assert relative(loaded(folder / "moe")(ids()).logits, expected) < 1e-5, fields
    return "agrees"


def _refill(path: Path) -> None:
    """Weights of the shapes that the class gives them for this config.json."""
    text = (path / "config.json").read_bytes()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.1)
    model.save_pretrained(path)
    (path / "config.json").write_bytes(text)


@torch.no_grad()
def test_what_no_class_writes_is_carried_or_refused_by_name(dense: Path, tmp_path: Path) -> None:
    told = {}
    for case, fields in ODD.items():
        told[case] = carried(dense, tmp_path / case, **fields)
        if told[case] not in ("", "agrees"):
            assert any(name in told[case] for name in fields), (case, told[case])
    assert sum(line == "agrees" for line in told.values()) >= 7, told


def others(field: str, value: Any) -> Iterator[Any]:
    """Another value of a field."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield type(value)(2 * value or 1)
        yield int(value) + 0.0 if isinstance(value, int) else int(value)
    elif isinstance(value, list):
        yield value[::-1]
    elif "act" in field:
        yield "gelu"
    elif value is None:
        yield 4


@torch.no_grad()
def test_every_field_of_the_class_is_carried_or_refused_by_name(
    dense: Path, tmp_path: Path
) -> None:
    values = json.loads((dense / "config.json").read_text())
    general = AutoConfig.for_model("bert").to_dict().keys() - {"tie_word_embeddings", "hidden_act"}
    fields = CONFIG_MAPPING[values["model_type"]]().to_dict()
    agreed = 0
    for field in fields.keys() - general - {*_SIZES}:
        for value in others(field, values.get(field, fields[field])):
            line = carried(dense, tmp_path / field, **{field: value})
            assert line in ("", "agrees") or field in line or "sliding_attention" in line, line
            agreed += line == "agrees"
    assert agreed >= 5
