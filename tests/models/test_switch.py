"""The models: padding, empty input, cache, losses, precision, checkpointing, bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import moezoo
from moezoo.models.cache import DecoderCache
from tests.models.tiny import TINY, source, tiny


def test_padding_never_changes_a_real_tokens_output() -> None:
    model = tiny()
    ids, target = source(1, 5), source(1, 4, seed=1)
    alone = model(ids, torch.ones_like(ids), decoder_input_ids=target).logits
    for garbage in (0, 17):
        for left in (False, True):
            pad = torch.full((1, 3), garbage)
            wide = torch.cat([pad, ids] if left else [ids, pad], 1)
            mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 5)][:: 1 if left else -1], 1).long()
            padded = model(wide, mask, decoder_input_ids=target).logits
            torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_rows_of_padding_and_empty_batches_work() -> None:
    model = tiny()
    ids, mask = source(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[1] = 0
    out = model(ids, mask, labels=source(2, 4))
    assert torch.isfinite(out.logits).all()
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for batch, length, target in ((0, 5, 4), (2, 0, 3), (2, 1, 1), (2, 3, 0)):
        empty = model(source(batch, length), labels=source(batch, target))
        assert empty.logits.shape == (batch, target, TINY.vocab_size)
        assert torch.isfinite(empty.loss)
    assert model.generate(source(0, 4)).shape[0] == 0


def test_labels_that_are_all_ignored_give_zero_cross_entropy() -> None:
    out = tiny()(source(), labels=torch.full((2, 4), -100))
    assert out.losses["cross_entropy"] == 0
    assert torch.isfinite(out.loss)


def test_the_loss_is_cross_entropy_plus_weighted_router_losses() -> None:
    model = tiny(router_losses={"load_balance": 0.5, "z": 0.25})
    out = model(source(), labels=source(2, 4))
    parts = out.losses
    expected = parts["cross_entropy"] + 0.5 * parts["load_balance"] + 0.25 * parts["z"]
    torch.testing.assert_close(out.loss, expected)
    assert set(parts) == {"cross_entropy", "load_balance", "z"}
    assert len(out.routing) == 2


def test_layers_that_collapse_on_different_experts_do_not_look_balanced() -> None:
    model = tiny(num_experts=2)
    with torch.no_grad():
        for number, stack in enumerate((model.encoder, model.decoder)):
            classifier = stack.blocks[1].mlp.router.classifier.weight
            norm = stack.blocks[1].mlp_norm.weight
            norm.zero_()
            norm[0] = 1.0
            classifier.zero_()
            classifier[:, 0] = torch.tensor([50.0, -50.0]) * (1 if number == 0 else -1)
            stack.blocks[1].mlp_norm.register_forward_hook(lambda m, i, o: o.abs() + 1.0)
    out = model(source(), decoder_input_ids=source(2, 4))
    assert out.losses["load_balance"].item() == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("overrides", [{}, {"position_bias_every_layer": True}, {"num_experts": 0}])
def test_decoding_with_a_cache_equals_the_whole_sequence(overrides: dict[str, object]) -> None:
    model = tiny(**overrides)
    ids, target = source(), source(2, 9, seed=5)
    whole = model(ids, decoder_input_ids=target).logits
    memory = model(ids, decoder_input_ids=target).encoder_last_hidden_state
    cache, steps = DecoderCache(), []
    for start, end in ((0, 1), (1, 2), (2, 5), (5, 9)):
        out = model(
            decoder_input_ids=target[:, start:end],
            encoder_last_hidden_state=memory,
            past_key_values=cache,
        )
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_generation_without_a_cache_gives_the_same_tokens() -> None:
    model = tiny()
    for beams in (1, 3):
        with_cache = model.generate(source(3), num_beams=beams)
        without = model.generate(source(3), num_beams=beams, use_cache=False)
        assert torch.equal(with_cache, without)


def test_after_eos_comes_padding_and_generation_stops() -> None:
    model = tiny()
    with torch.no_grad():
        model.shared.weight[1] = 50 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    ids = model.generate(source(8, seed=4), max_new_tokens=30)
    for row in ids.tolist():
        if 1 in row:
            assert set(row[row.index(1) + 1 :]) <= {0}
    assert any(1 in row for row in ids.tolist())


def test_sampling_draws_from_the_allowed_tokens_only() -> None:
    model = tiny()
    torch.manual_seed(0)
    greedy = model.generate(source(), max_new_tokens=5)
    assert torch.equal(model.generate(source(), max_new_tokens=5, do_sample=True, top_k=1), greedy)
    assert torch.equal(
        model.generate(source(), max_new_tokens=5, do_sample=True, top_p=1e-6), greedy
    )
    drawn = model.generate(source(1), do_sample=True, temperature=5.0, num_return_sequences=6)
    assert drawn.shape[0] == 6
    assert len({tuple(row) for row in drawn.tolist()}) > 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"do_sample": True, "num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_bad_generation_options_are_named(options: dict[str, object], field: str) -> None:
    with pytest.raises(moezoo.MoezooError) as caught:
        tiny().generate(source(), **options)
    assert caught.value.field == field


def test_gradient_checkpointing_changes_no_gradient() -> None:
    router = {"name": "switch", "jitter": 0.1}
    gradients = []
    for enabled in (False, True):
        model = tiny(router=router, dropout_rate=0.1).train()
        model.gradient_checkpointing(enabled)
        torch.manual_seed(7)
        model(source(), labels=source(2, 4)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_router_runs_in_float32_under_bfloat16_and_autocast() -> None:
    half = tiny().to(torch.bfloat16)
    out = half(source(), decoder_input_ids=source(2, 3))
    assert out.logits.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tiny()(source(), decoder_input_ids=source(2, 3))
    for routing in (*out.routing, *mixed.routing):
        assert routing.logits.dtype == torch.float32
        assert routing.probs.sum(-1).sub(1).abs().max() < 1e-6


def test_a_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (moezoo.build(TINY, seed=11).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = moezoo.build(TINY, seed=12).state_dict()
    assert not torch.equal(first["shared.weight"], other["shared.weight"])


def test_models_copy_and_pickle() -> None:
    model = tiny()
    expected = model(source(), decoder_input_ids=source(2, 3)).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(source(), decoder_input_ids=source(2, 3)).logits, expected)


def test_float16_activations_stay_finite() -> None:
    model = tiny().half()
    with torch.no_grad():
        model.decoder.blocks[0].mlp.wo.weight.fill_(6e4)
    assert torch.isfinite(model(source(), decoder_input_ids=source(2, 3)).last_hidden_state).all()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "input_ids"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.full((1, 2), 61)}, "input_ids"),
        ({"input_ids": torch.full((1, 2), -1)}, "input_ids"),
        ({"inputs_embeds": torch.zeros(1, 2, 9)}, "inputs_embeds"),
        ({"input_ids": source(), "attention_mask": torch.ones(2, 3).long()}, "attention_mask"),
        ({"input_ids": source(), "attention_mask": torch.ones(2, 7)}, "attention_mask"),
        ({"input_ids": source()}, "decoder_input_ids"),
        ({"input_ids": source(), "labels": source(3, 2)}, "decoder_input_ids"),
        (
            {"input_ids": source(), "labels": source(2, 3), "decoder_input_ids": source(2, 4)},
            "labels",
        ),
        (
            {"encoder_last_hidden_state": torch.zeros(2, 3, 5), "decoder_input_ids": source(2, 3)},
            "encoder_last_hidden_state",
        ),
        ({"inputs_embeds": torch.zeros(1, 2, 16, dtype=torch.long)}, "inputs_embeds"),
        ({"input_ids": source().to("meta")}, "input_ids"),
        ({"input_ids": [[1, 2]]}, "input_ids"),
        ({"input_ids": source(), "attention_mask": [[1] * 7] * 2}, "attention_mask"),
        ({"input_ids": source(), "labels": torch.full((2, 3), -5)}, "labels"),
        ({"input_ids": source(), "labels": torch.zeros(2, 3)}, "labels"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, torch.Tensor], field: str) -> None:
    with pytest.raises(moezoo.MoezooError) as caught:
        tiny()(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_expert": 4}, "num_experts"),
        ({"router": "swich"}, "switch"),
        ({"router": {"name": "switch", "jiter": 0.1}}, "jitter"),
        ({"router": {"name": "top_k", "k": 9}}, "k is out of range"),
        ({"d_model": -1}, "d_model"),
        ({"d_model": "wide"}, "d_model"),
        ({"encoder_sparse_layers": (7,)}, "encoder_sparse_layers"),
        ({"capacity": {"name": "first_come", "limit": 0}}, "limit"),
        ({"capacity": {"name": "first_come", "factor": math.nan}}, "factor"),
    ],
)
def test_bad_overrides_are_named_with_the_way_out(
    overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(moezoo.MoezooError, match=message):
        moezoo.build(TINY, **overrides)


def test_a_leaking_pair_is_refused_in_a_decoder_unless_allowed() -> None:
    leaky = {
        "router": {"name": "top_k", "k": 2},
        "capacity": {"name": "first_come", "order": "rank"},
    }
    with pytest.raises(moezoo.MoezooError, match="not causal"):
        moezoo.build(TINY, **leaky)
    assert moezoo.build(TINY, **leaky, allow_noncausal=True) is not None
    assert moezoo.build(TINY, **leaky, decoder_sparse_layers="none") is not None


def test_behind_the_last_label_no_token_is_routed_and_no_loss_counts() -> None:
    model = tiny(router_losses={"load_balance": 1.0, "z": 1.0}, encoder_sparse_layers="none")
    ids, labels = source(2, 5), source(2, 4, seed=8)
    padded = torch.cat([labels, torch.full((2, 3), -100)], 1)
    short, long = model(ids, labels=labels), model(ids, labels=padded)
    for name, value in short.losses.items():
        torch.testing.assert_close(long.losses[name], value, msg=name)
    (routing,) = long.routing
    assert routing.assignment.kept.view(2, 7).tolist() == [[True] * 4 + [False] * 3] * 2


def test_without_labels_there_is_no_loss_but_its_router_parts() -> None:
    out = tiny()(source(), decoder_input_ids=source(2, 3))
    assert out.loss is None
    assert set(out.losses) == {"load_balance", "z"}
    for task, arguments in (("encoder", {}), ("model", {"decoder_input_ids": source(2, 3)})):
        found = tiny(task)(source(), **arguments)
        torch.testing.assert_close(found.loss, 0.01 * found.losses["load_balance"])


def test_a_mask_of_ones_changes_nothing() -> None:
    model, ids, target = tiny(), source(), source(2, 3)
    plain = model(ids, decoder_input_ids=target).logits
    ones = model(ids, torch.ones_like(ids), decoder_input_ids=target).logits
    assert torch.equal(plain, ones)


def test_what_lies_in_padded_embeddings_never_matters() -> None:
    model = tiny()
    embeds = torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    target = source(2, 3)
    clean = model(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=target).logits
    embeds[1, 2:] = torch.nan
    dirty = model(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=target).logits
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize(
    ("width", "given", "scale"),
    [(64, None, 1.0), (64, 0.1, 0.1), (511, None, 1.0), (512, None, 0.1), (512, 1.0, 1.0)],
)
def test_a_sparse_model_starts_with_a_tenth_of_the_variance_from_the_smallest_published_size_on(
    width: int, given: float | None, scale: float
) -> None:
    sizes = {"d_model": width, "d_ff": 128, "num_heads": 4, "d_kv": 16}
    config = TINY.replace(**sizes, initializer_scale=given)
    sparse, dense = (moezoo.build(config, seed=0, num_experts=e) for e in (4, 0))
    block, plain = sparse.encoder.blocks[0], dense.encoder.blocks[0]
    for found, expected in (
        (block.mlp.wi.weight, (scale / width) ** 0.5),
        (block.attention.o.weight, (scale / 64) ** 0.5),
        (sparse.encoder.blocks[1].mlp.experts.wo, (scale / 128) ** 0.5),
        (sparse.encoder.blocks[1].mlp.router.classifier.weight, 0.02),
        (plain.mlp.wi.weight, width**-0.5),
        (plain.attention.q.weight, (width * 16) ** -0.5),
    ):
        assert found.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"task": "translation"}, "task"),
        ({"seed": "one"}, "seed"),
        ({"dtype": torch.int8}, "dtype"),
        ({"device": "quantum"}, "device"),
    ],
)
def test_bad_arguments_of_build_are_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(moezoo.MoezooError) as caught:
        moezoo.build(TINY, **arguments)
    assert caught.value.field == field


def test_building_honours_dtype_and_the_surrounding_device() -> None:
    assert moezoo.build(TINY, dtype=torch.bfloat16).shared.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    with torch.device("meta"):
        assert moezoo.build(TINY).shared.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_every_integer_dtype_is_read_alike(dtype: torch.dtype) -> None:
    model, ids, labels = tiny(), source(), source(2, 4)
    expected = model(ids, torch.ones_like(ids), labels=labels).loss
    found = model(ids.to(dtype), torch.ones_like(ids, dtype=dtype), labels=labels.to(dtype)).loss
    assert torch.equal(found, expected)
