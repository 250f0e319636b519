"""Equality with transformers on random weights, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.parity.hf_weights import SIZES, copy_weights, moezoo_model, randomize  # noqa: E402

TOLERANCE = 1e-4
COMMON = {**SIZES, "dropout_rate": 0.0, "decoder_start_token_id": 0}
SPARSE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 3}

# family -> (transformers' class prefix, its config, the moezoo overrides that say the same)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "t5": ("T5", {}, {}),
    "t5 v1.1": (
        "T5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "ul2": (
        "T5",
        {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    ),
    "byt5": (
        "T5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
    ),
    "mt5": (
        "MT5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "scale_decoder_outputs": False,
        },
    ),
    "umt5": (
        "UMT5",
        {"feed_forward_proj": "gated-gelu"},
        {
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "position_bias_every_layer": True,
            "scale_decoder_outputs": True,
        },
    ),
    "switch": (
        "SwitchTransformers",
        {"num_experts": 4, **SPARSE},
        {
            "num_experts": 4,
            "encoder_sparse_layers": (1,),
            "decoder_sparse_layers": (1,),
            "capacity": {"name": "transformers", "limit": 64},
        },
    ),
    "switch that drops": (
        "SwitchTransformers",
        {"num_experts": 2, "expert_capacity": 2, **SPARSE},
        {
            "num_experts": 2,
            "encoder_sparse_layers": (1,),
            "decoder_sparse_layers": (1,),
            "capacity": {"name": "transformers", "limit": 2},
        },
    ),
}


def pair(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A transformers model and ours with the same random weights."""
    prefix, theirs, ours = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **theirs})
    reference = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    if not ours.get("tie_word_embeddings", True):
        # transformers 5 ties the head of a new model whatever the config says; checkpoints do not.
        reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    randomize(reference)
    model = moezoo_model(**ours)
    copy_weights(reference, model)
    return reference, model


def batch(*, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources padded on either side, and targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, SIZES["vocab_size"], (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, :3] = 0
    return ids, mask, torch.randint(2, SIZES["vocab_size"], (rows, 5), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str) -> None:
    reference, model = pair(family)
    ids, mask, target = batch()
    with torch.no_grad():
        theirs = reference(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
        ours = model(ids, mask, decoder_input_ids=target).logits
    assert theirs.abs().max() > 0.1, "logits near zero would agree by themselves"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_and_gradients_equal_transformers(family: str) -> None:
    reference, model = pair(family)
    ids, mask, labels = batch()
    labels[0, 3:] = -100
    theirs = reference(input_ids=ids, attention_mask=mask, labels=labels)
    theirs.loss.backward()
    ours = model(ids, mask, labels=labels)
    ours.losses["cross_entropy"].backward()
    torch.testing.assert_close(ours.losses["cross_entropy"], theirs.loss, atol=1e-5, rtol=1e-5)
    expected = type(model)(model.config)
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    for parameter in reference.parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.data = gradient
    copy_weights(reference, expected)
    assert gradients
    for (name, ours_p), (_, theirs_p) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert ours_p.grad is not None, f"{name} has no gradient"
        torch.testing.assert_close(ours_p.grad, theirs_p.data, atol=TOLERANCE, rtol=1e-3, msg=name)


GENERATION: list[dict[str, Any]] = [
    {},
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 0.6, "num_return_sequences": 2},
    {"num_beams": 2, "early_stopping": True, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.5, "min_new_tokens": 4},
]


@pytest.mark.parametrize("options", GENERATION, ids=str)
@pytest.mark.parametrize("family", ["t5", "umt5", "byt5", "switch"])
def test_generated_tokens_equal_transformers(family: str, options: dict[str, Any]) -> None:
    reference, model = pair(family)
    ids, mask, _ = batch()
    theirs = reference.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options
    )
    ours = model.generate(ids, mask, max_new_tokens=12, **options)
    # transformers fills up beams with eos when the padding id is 0; ours is padding.
    ended = (theirs == 1).cumsum(1) - (theirs == 1).int() > 0
    assert torch.equal(ours, theirs.masked_fill(ended, 0))


@pytest.mark.parametrize("family", ["t5", "t5 v1.1", "umt5"])
def test_the_encoder_alone_equals_transformers(family: str) -> None:
    prefix, theirs, ours = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **theirs})
    reference = getattr(transformers, f"{prefix}EncoderModel")(config).eval()
    randomize(reference)
    model = moezoo_model(task="encoder", **ours)
    copy_weights(reference, model)
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        found = model(ids, mask).last_hidden_state
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
