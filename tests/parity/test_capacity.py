"""Equality with transformers on a Switch whose own capacity binds, through the files of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import moezoo  # noqa: E402
from tests.parity.hf_weights import SIZES, randomize  # noqa: E402

CAPACITY = 2


def reference(**fields: Any) -> torch.nn.Module:
    """A Switch of transformers with a router bias, whose experts are soon full."""
    config = transformers.SwitchTransformersConfig(
        **SIZES,
        num_decoder_layers=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        expert_capacity=CAPACITY,
        router_bias=True,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **fields,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    randomize(model, seed=4)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources, one of them padded at its end, and targets."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(2, SIZES["vocab_size"], (3, 11), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids, mask, torch.randint(2, SIZES["vocab_size"], (3, 7), generator=draw)


def check(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    ids, mask, target = batch()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
        found = ours(ids, mask, decoder_input_ids=target).logits
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for beams in (1, 3):
        options = {"num_beams": beams, "max_new_tokens": 10}
        answer = theirs.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
        ended = (answer == 1).cumsum(1) - (answer == 1).int() > 0
        assert torch.equal(ours.generate(ids, mask, **options), answer.masked_fill(ended, 0))


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_new"])
def test_a_switch_whose_capacity_binds_equals_transformers(act: str, tmp_path: Path) -> None:
    theirs = reference(dense_act_fn=act)
    theirs.save_pretrained(tmp_path / "in")
    ours = moezoo.load(tmp_path / "in", capacity="transformers")
    assert ours.config.expert_capacity == CAPACITY
    check(ours, theirs)
    ids, mask, target = batch()
    free = moezoo.load(tmp_path / "in")(ids, mask, decoder_input_ids=target).logits
    bound = ours(ids, mask, decoder_input_ids=target).logits
    assert (free - bound).abs().max() > 1e-2, "the capacity must bind for this to say anything"


@pytest.mark.parametrize("layout", ["huggingface", "moezoo"])
@pytest.mark.parametrize("capacity", [None, "transformers"])
def test_its_capacity_survives_load_and_save(layout: str, capacity: Any, tmp_path: Path) -> None:
    theirs = reference()
    theirs.save_pretrained(tmp_path / "in")
    moezoo.save(moezoo.load(tmp_path / "in", capacity=capacity), tmp_path / "out", layout=layout)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values.get("moezoo_config", values).get("expert_capacity", CAPACITY) == CAPACITY
    check(moezoo.load(tmp_path / "out", capacity="transformers"), theirs)
    if layout == "huggingface":
        assert values["expert_capacity"] == CAPACITY
        kind = transformers.SwitchTransformersForConditionalGeneration
        check(moezoo.load(tmp_path / "in", capacity="transformers"),
              kind.from_pretrained(tmp_path / "out").eval())  # fmt: skip


def test_an_own_limit_wins_over_the_files_and_a_model_without_one_is_written_without_bounds(
    tmp_path: Path,
) -> None:
    reference().save_pretrained(tmp_path / "in")
    wider = moezoo.load(tmp_path / "in", capacity={"name": "transformers", "limit": 5})
    assert limits(wider) == {5}
    assert limits(moezoo.load(tmp_path / "in", capacity="transformers")) == {CAPACITY}
    moezoo.save(moezoo.build(wider.config.replace(expert_capacity=None, capacity=None)),
                tmp_path / "own")  # fmt: skip
    assert json.loads((tmp_path / "own/config.json").read_text())["expert_capacity"] == 1_000_000


def limits(model: torch.nn.Module) -> set[int]:
    """What the layers of a model limit their experts to."""
    policies = [m.capacity for m in model.modules() if isinstance(m, moezoo.MoE)]
    assert policies
    return {int(repr(policy).partition("limit=")[2].rstrip(")")) for policy in policies}
