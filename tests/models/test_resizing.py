"""Another vocabulary: old rows stay, new ones are the mean, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo.errors import ConfigError
from tests.models.tiny import TINY, source, tiny

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "own tables": {"own_embeddings": ("encoder", "decoder")},
    "own decoder, untied": {"own_embeddings": ("decoder",), "tie_word_embeddings": False},
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(source(), decoder_input_ids=source(seed=1)).logits
    return found


@pytest.mark.parametrize("rows", [40, 61, 80])
@pytest.mark.parametrize("name", MODELS)
def test_old_tokens_keep_their_logits_and_new_ones_have_the_mean(name: str, rows: int) -> None:
    model = tiny(**MODELS[name])
    ids = source().clamp(max=rows - 1), source(seed=1).clamp(max=rows - 1)
    with torch.no_grad():
        before = model(ids[0], decoder_input_ids=ids[1]).logits
        assert moezoo.resize_embeddings(model, rows) is model
        after = model(ids[0], decoder_input_ids=ids[1]).logits
    kept = min(rows, TINY.vocab_size)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    if rows > TINY.vocab_size:
        mean = before.mean(-1, keepdim=True).expand(-1, -1, rows - kept)
        torch.testing.assert_close(after[..., kept:], mean, rtol=1e-4, atol=1e-4)
    assert after.shape[-1] == model.config.vocab_size == rows
    assert all(p.requires_grad for p in model.parameters())
    model(ids[0], labels=ids[1]).loss.backward()
    assert model.generate(ids[0], max_new_tokens=3).max() < rows


def test_a_resized_model_saves_and_loads_and_keeps_dtype_and_mode(tmp_path: Path) -> None:
    model = tiny(own_embeddings=("encoder",)).bfloat16().train()
    model.shared.weight.requires_grad_(False)
    moezoo.resize_embeddings(model, 77)
    assert model.shared.weight.dtype == torch.bfloat16 and model.shared.training
    assert not model.shared.weight.requires_grad
    assert model.encoder.embed_tokens.weight.requires_grad
    moezoo.save(model, tmp_path / "out")
    state = moezoo.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("task", ["model", "encoder"])
def test_models_without_a_head_are_resized_too(task: str) -> None:
    model = moezoo.resize_embeddings(tiny(task), 70)
    assert model.shared.num_embeddings == 70
    assert model.get_parameter("shared.weight").shape == (70, TINY.d_model)


def test_what_cannot_be_resized_is_refused_and_stays_as_it_was() -> None:
    for rows, field in ((0, "vocab_size"), (True, "vocab_size"), ("9", "vocab_size"), (1, "eos")):
        model = tiny()
        with pytest.raises(ConfigError, match=field):
            moezoo.resize_embeddings(model, rows)  # type: ignore[arg-type]
        assert model.config.vocab_size == model.shared.num_embeddings == TINY.vocab_size
    with pytest.raises(ConfigError, match="routes by token id"):
        moezoo.resize_embeddings(tiny(router="hash"), 70)
    with pytest.raises(ConfigError, match="only moezoo models"):
        moezoo.resize_embeddings(nn.Embedding(3, 4), 70)
    for fields in ({}, {"tie_word_embeddings": False}):
        model = tiny(**fields)
        moezoo.quantize(model)
        with pytest.raises(ConfigError, match=r"lm_head.*before moezoo\.quantize"):
            moezoo.resize_embeddings(model, 70)
        assert model.shared.num_embeddings == TINY.vocab_size


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}])
def test_a_quantised_model_with_tables_of_its_own_keeps_them_whole(fields: dict[str, Any]) -> None:
    model = tiny(own_embeddings=("encoder", "decoder"), **fields)
    expected = logits(model)
    report = moezoo.quantize(model)
    assert {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= set(report.skipped)
    assert moezoo.quantization.relative_error(expected, logits(model)) < 0.05
    assert model.generate(source(), max_new_tokens=4).shape[0] == 2


def test_a_table_of_its_own_is_what_a_stack_reads() -> None:
    model = tiny(own_embeddings=("encoder", "decoder"), tie_word_embeddings=False)
    expected = logits(model)
    with torch.no_grad():
        model.shared.weight.zero_()
    assert torch.equal(logits(model), expected)
    for stack in (model.encoder, model.decoder):
        before = logits(model)
        with torch.no_grad():
            stack.embed_tokens.weight.mul_(-0.7)
        assert not torch.allclose(logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stacks", [("decoder", "encoder"), ("encoder", "encoder"), ("head",), 3])
def test_stacks_that_do_not_exist_are_refused(stacks: Any) -> None:
    with pytest.raises(ConfigError, match="own_embeddings"):
        moezoo.SwitchConfig(own_embeddings=stacks)
