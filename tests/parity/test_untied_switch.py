"""A Switch model that ties nothing (own tables in both stacks, gelu experts, router bias) is
transformers' model, both ways.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import moezoo  # noqa: E402
from moezoo.adapters.transformers import from_transformers, to_transformers  # noqa: E402
from tests.parity.hf_weights import SIZES, randomize  # noqa: E402

SPARSE = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
UNTIED = {**SIZES, **SPARSE, "num_decoder_layers": 3, "dropout_rate": 0.0, "router_bias": True,
          "dense_act_fn": "gelu", "tie_word_embeddings": False, "expert_capacity": 64,
          "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
TABLES = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


def untied(**fields: Any) -> Any:
    """transformers' model with weights that make logits of order one."""
    config = transformers.SwitchTransformersConfig(**(UNTIED | fields))
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    randomize(model)
    return model


def drawn(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SIZES["vocab_size"], (3, 7), generator=generator)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=drawn(), decoder_input_ids=drawn(1)).logits
    return found


def strictly(path: Path) -> Any:
    """The model as transformers loads it, without a key too many or too few."""
    cls = transformers.SwitchTransformersForConditionalGeneration
    model, report = cls.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu", "relu", "relu2"])
def test_logits_and_tokens_equal_transformers_and_it_loads_what_is_written(
    activation: str, tmp_path: Path
) -> None:
    theirs = untied(dense_act_fn=activation)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = moezoo.load(tmp_path / "theirs")
    assert ours.config.own_embeddings == ("encoder", "decoder")
    assert not ours.config.tie_word_embeddings
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    for beams in (1, 4):
        options = {"num_beams": beams, "max_new_tokens": 9, "do_sample": False}
        expected = theirs.generate(input_ids=drawn(), **options)
        ended = (expected == 1).cumsum(1) - (expected == 1).int() > 0
        assert torch.equal(ours.generate(drawn(), **options), expected.masked_fill(ended, 0))
    moezoo.save(ours, tmp_path / "ours", layout="huggingface")
    assert torch.equal(logits(strictly(tmp_path / "ours")), logits(theirs))
    assert torch.equal(logits(from_transformers(theirs)), logits(ours))
    assert torch.equal(logits(to_transformers(ours)), logits(theirs))


@pytest.mark.parametrize("tied", [(), TABLES[:1], TABLES[:2], TABLES[2:], TABLES])
def test_tables_that_are_equal_are_shared_here_and_written_out_for_transformers(
    tied: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = untied()
    for name in tied:
        theirs.get_submodule(name).weight = nn.Parameter(theirs.shared.weight.clone())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = moezoo.load(tmp_path / "theirs")
    own = [stack for stack in ("encoder", "decoder") if f"{stack}.embed_tokens" not in tied]
    assert list(ours.config.own_embeddings) == own
    assert ours.config.tie_word_embeddings == ("lm_head" in tied)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    moezoo.save(ours, tmp_path / "ours", layout="huggingface")
    assert torch.equal(logits(strictly(tmp_path / "ours")), logits(theirs))
    assert moezoo.load(tmp_path / "ours").config == ours.config
    assert torch.equal(logits(to_transformers(ours)), logits(theirs))


@pytest.mark.parametrize("verb", ["grow", "shrink", "export", "downcycle and upcycle"])
def test_what_conversions_write_loads_strictly_in_transformers(verb: str, tmp_path: Path) -> None:
    from moezoo.cli import main

    source, out = tmp_path / "theirs", tmp_path / "out"
    theirs = untied(router_bias=False)
    theirs.encoder.embed_tokens.weight = nn.Parameter(theirs.shared.weight.clone())
    theirs.save_pretrained(source)
    words: list[list[Any]] = {
        "grow": [["grow", source, out]],
        "shrink": [["shrink", source, out, "--experts", 3]],
        "export": [["export", source, out]],
        "downcycle and upcycle": [
            ["export", source, tmp_path / "dense", "--expert", 1, "--wo-scale", 1],
            ["upcycle", tmp_path / "dense", out, "--experts", 4, "--verify"],
        ],
    }[verb]
    for line in words:
        assert main([str(word) for word in line]) == 0
    ours = moezoo.load(out, capacity="dropless")
    assert ours.config.own_embeddings == ("decoder",)
    torch.testing.assert_close(logits(strictly(out)), logits(ours), rtol=1e-4, atol=1e-4)
