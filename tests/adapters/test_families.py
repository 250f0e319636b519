"""What config.json of the family means, field by field, and what is written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from moezoo.adapters.families import family_of, layout_for
from moezoo.adapters.families.base import Weights
from moezoo.adapters.upcycle.export import export
from moezoo.functional.activations import activation
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


REAL = Path(__file__).parents[3] / "shared" / "real" / "configs"
# What the published files of shared/real/configs say, as far as it is no size; each is also made
# here from its fields, so that the claims hold where the folder is not.
GATED = {"feed_forward_proj": "gated-gelu"}
UNTIED = {"tie_word_embeddings": False}
V4 = {"dense_act_fn": "gelu_new", "is_gated_act": True}
PLAIN = {"dense_act_fn": "relu", "is_gated_act": False}
# name -> (the file's fields but sizes and ids, whether its head is its own, fields of the config)
PUBLISHED: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "byt5-small-polish": (
        {"model_type": "t5", **GATED, **V4, **UNTIED},
        True,
        {**GATED, "scales_logits": False, "decoder_layers": 4},
    ),
    "codet5-defect-cls": (
        {"model_type": "t5", "feed_forward_proj": "relu", **PLAIN},
        False,
        {"feed_forward_proj": "relu", "scales_logits": True, "eos_token_id": 2},
    ),
    "flan-t5-base": ({"model_type": "t5", **GATED, **UNTIED}, True, {**GATED}),
    "mt5-large": ({"model_type": "mt5", **GATED, **UNTIED}, True, {**GATED}),
    "pile-t5-base": (
        {"model_type": "umt5", **GATED, **V4, **UNTIED},
        True,
        {**GATED, "position_bias_every_layer": True, "eos_token_id": 2, "scales_logits": False},
    ),
    "switch-base-256": (
        {
            "model_type": "switch_transformers",
            "feed_forward_proj": "relu",
            **PLAIN,
            "num_experts": 256,
            "expert_capacity": 64,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_sparse_encoder_layers": 6,
            "num_sparse_decoder_layers": 6,
            "num_selected_experts": 1,
            "router_type": "tokens_masked",
            "router_dtype": "float32",
            "router_jitter_noise": 0.01,
            "router_ignore_padding_tokens": False,
            "add_router_probs": False,
        },
        False,
        {
            "num_experts": 256,
            "expert_capacity": 64,
            "encoder_sparse": (1, 3, 5, 7, 9, 11),
            "decoder_sparse": (1, 3, 5, 7, 9, 11),
            "router": {"name": "switch", "jitter": 0.01},
            "router_losses": {"load_balance": 0.001, "z": 0.001},
            "scales_logits": True,
        },
    ),
    "t5-base-snli-cls": (
        {"model_type": "t5", "feed_forward_proj": "relu", **PLAIN},
        False,
        {"feed_forward_proj": "relu", "scales_logits": True},
    ),
    # `dense_act_fn` and `is_gated_act` win: a gated layer with the exact gelu.
    "t5-uNLU": (
        {"model_type": "t5", "feed_forward_proj": "gelu", "dense_act_fn": "gelu",
         "is_gated_act": True, **UNTIED},
        True,
        {"feed_forward_proj": "gated-gelu-erf", "decoder_layers": 3, "scales_logits": False},
    ),
    # No model_type, and not the gates that UMT5 has by default.
    "umt5-base-first-revision": (
        {"architectures": ["UMT5ForConditionalGeneration"], **PLAIN, **UNTIED},
        True,
        {"feed_forward_proj": "relu", "position_bias_every_layer": True, "scales_logits": False},
    ),
    "wan-umt5-xxl-enc": (
        {"model_type": "umt5", **GATED, **V4, **UNTIED},
        False,
        {**GATED, "position_bias_every_layer": True, "scales_logits": False},
    ),
}  # fmt: skip
BASE = {**SIZES, "vocab_size": 97, "num_layers": 12, "num_decoder_layers": 12}


def published(name: str, *, real: bool) -> dict[str, Any]:
    """The real file, or a stand-in of its fields."""
    fields, _, expected = PUBLISHED[name]
    if not real:
        layers = {"num_decoder_layers": expected.get("decoder_layers", 12)}
        return {**BASE, **fields, **layers, "eos_token_id": expected.get("eos_token_id", 1)}
    if not REAL.is_dir():
        pytest.skip("shared/real/configs is not here")
    values: dict[str, Any] = json.loads((REAL / f"{name}.json").read_text())
    assert fields.items() <= values.items(), "the stand-in says what the file says"
    return values


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "real"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_reads_as_what_its_weights_are_run_with(name: str, real: bool) -> None:
    values = published(name, real=real)
    _, own_head, expected = PUBLISHED[name]
    config = family_of(values).read(values, Weights(frozenset(), own_head))
    found = {field: getattr(config, field) for field in expected}
    assert found == expected
    assert config.tie_word_embeddings is not own_head
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    assert {field: getattr(config, field) for field in sizes} == {f: values[f] for f in sizes}
    assert config.pad_token_id == 0 and config.decoder_start_token_id == 0
    assert moezoo.SwitchConfig.from_json(config.to_json()) == config


def test_every_real_config_has_its_expectation() -> None:
    if not REAL.is_dir():
        pytest.skip("shared/real/configs is not here")
    assert {path.stem for path in REAL.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n not in ("umt5-base-first-revision",)])
def test_what_is_written_reads_as_the_same_and_keeps_every_other_field(name: str) -> None:
    extra = {
        "task_specific_params": {"summarization": {"prefix": "summarize: "}},
        "n_positions": 512,
        "_name_or_path": "somewhere",
        "id2label": {"0": "LABEL_0"},
        "custom": [1, {"a": None}],
        "transformers_version": "4.23.1",
        "use_cache": False,
        "bos_token_id": 1,
    }
    values = {**published(name, real=False), **extra}
    _, own_head, _ = PUBLISHED[name]
    weights = Weights(frozenset(), own_head)
    config = family_of(values).read(values, weights)
    for layout in ("auto", "moezoo"):
        family = layout_for(config, layout)
        written = json.loads(json.dumps(family.write(config, "conditional_generation")))
        assert {field: written[field] for field in extra} == extra
        again = family_of(written).read(written, weights)
        given = {"num_decoder_layers": config.decoder_layers}
        assert again == config.replace(**given) and again.other_fields == config.other_fields


ACT2FN = pytest.importorskip("transformers").activations.ACT2FN
TAKEN = {
    "relu", "relu2", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate",
    "gelu_pytorch_tanh", "gelu_python_tanh", "quick_gelu", "silu", "swish",
}  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("word", sorted({*ACT2FN} - {"xielu"}))
def test_every_activation_is_computed_as_transformers_does_or_refused_by_name(
    word: str, gated: bool
) -> None:
    fields = {"feed_forward_proj": "relu", "dense_act_fn": word, "is_gated_act": gated}
    if word not in TAKEN or (word in ("relu2", "quick_gelu") and gated):
        with pytest.raises(moezoo.MoezooError, match=f"dense_act_fn.*{word}"):
            read(**fields)
        return
    config = read(**fields)
    function, is_gated = activation(config.feed_forward_proj)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(function(x), ACT2FN[word](x), atol=1e-12, rtol=0)
    assert is_gated is gated
    written = layout_for(config).write(config, "conditional_generation")
    theirs = pytest.importorskip("transformers").T5Config(**written)
    spelled = pytest.importorskip("transformers").T5Config(
        feed_forward_proj=written["feed_forward_proj"]
    )
    for said in (theirs, spelled):
        assert said.is_gated_act is gated
        torch.testing.assert_close(ACT2FN[said.dense_act_fn](x), function(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("t5", {}, "relu"),
        ("mt5", {}, "gated-gelu"),
        ("umt5", {}, "gated-gelu"),
        ("t5", {"feed_forward_proj": "gated-gelu"}, "gated-gelu"),
        ("t5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "gated-gelu-erf"),
        ("t5", {"feed_forward_proj": "gated-gelu", "is_gated_act": False}, "gelu-tanh"),
        ("t5", {"feed_forward_proj": "gated-silu", "dense_act_fn": None}, "gated-silu"),
        ("t5", {"feed_forward_proj": "gelu", "is_gated_act": True}, "gated-gelu-erf"),
        ("umt5", {"dense_act_fn": "relu"}, "gated-relu"),
        ("switch_transformers", {"feed_forward_proj": "gelu"}, "relu"),
        ("switch_transformers", {"dense_act_fn": "gelu", "feed_forward_proj": "relu"}, "gelu"),
    ],
    ids=str,
)
def test_the_activation_is_the_one_that_transformers_would_run(
    model_type: str, fields: dict[str, Any], expected: str
) -> None:
    assert read(model_type=model_type, **fields).feed_forward_proj == expected
    theirs = pytest.importorskip("transformers").AutoConfig.for_model(
        model_type, **{k: v for k, v in fields.items() if v is not None}
    )
    function, gated = activation(expected)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(function(x), ACT2FN[theirs.dense_act_fn](x), atol=1e-12, rtol=0)
    assert getattr(theirs, "is_gated_act", False) is gated


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"feed_forward_proj": "gated-gelu-new"}, "feed_forward_proj"),
        ({"feed_forward_proj": "geglu-gelu"}, "feed_forward_proj"),
        ({"feed_forward_proj": 3}, "feed_forward_proj"),
        ({"dense_act_fn": ["relu"]}, "dense_act_fn"),
        ({"is_gated_act": "yes"}, "is_gated_act"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"scale_decoder_outputs": "no"}, "scale_decoder_outputs"),
        ({"torch_dtype": "float31"}, "torch_dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": 32}, "dtype"),
        ({"hidden_size": 17}, "d_model"),
        ({"num_hidden_layers": 3}, "num_layers"),
        ({"num_attention_heads": 1}, "num_heads"),
        ({"head_dim": 5}, "d_kv"),
        ({"d_model": "16"}, "d_model"),
        ({"num_layers": True}, "num_layers"),
        ({"dropout_rate": 1.5}, "dropout_rate"),
        ({"dropout_rate": "0.1"}, "dropout_rate"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"pad_token_id": "0"}, "pad_token_id"),
        ({"decoder_start_token_id": [0]}, "decoder_start_token_id"),
        ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
    ],
    ids=str,
)
def test_absurd_values_are_refused_by_the_field_of_the_file(
    fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(moezoo.MoezooError, match=field) as caught:
        read(**fields)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"expert_capacity": 0}, "expert_capacity"),
        ({"expert_capacity": -1}, "expert_capacity"),
        ({"expert_capacity": 64.0}, "expert_capacity"),
        ({"expert_capacity": True}, "expert_capacity"),
        ({"num_sparse_encoder_layers": 3}, "num_sparse_encoder_layers"),
        ({"num_sparse_decoder_layers": 3, "decoder_sparse_step": 1}, "num_sparse_decoder_layers"),
        ({"num_sparse_encoder_layers": -1}, "num_sparse_encoder_layers"),
        ({"encoder_sparse_step": "2"}, "encoder_sparse_step"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": "8"}, "num_experts"),
        ({"router_dtype": "bfloat16"}, "router_dtype"),
        ({"router_dtype": "float33"}, "router_dtype"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise"),
        ({"router_jitter_noise": 1.0}, "router_jitter_noise"),
        ({"router_jitter_noise": True}, "router_jitter_noise"),
        ({"router_bias": 1}, "router_bias"),
        ({"router_z_loss_coef": "0.1"}, "router_z_loss_coef"),
        ({"router_aux_loss_coef": float("inf")}, "router_aux_loss_coef"),
        ({"router_type": "experts_masked"}, "router_type"),
        ({"num_selected_experts": 2}, "num_selected_experts"),
        ({"batch_prioritized_routing": True}, "batch_prioritized_routing"),
    ],
    ids=str,
)
def test_absurd_values_of_switch_are_refused_by_the_field_of_the_file(
    fields: dict[str, Any], field: str
) -> None:
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    with pytest.raises(moezoo.MoezooError, match=field) as caught:
        read(model_type="switch_transformers", **{**sparse, **fields})
    assert len(str(caught.value)) < 300


def test_aliases_are_taken_alone_and_beside_their_equals() -> None:
    names = {"hidden_size": "d_model", "num_hidden_layers": "num_layers",
             "num_attention_heads": "num_heads", "head_dim": "d_kv"}  # fmt: skip
    values: dict[str, Any] = {alias: SIZES[name] for alias, name in names.items()}
    rest = {name: value for name, value in SIZES.items() if name not in names.values()}
    given = {"model_type": "t5", **rest, **values}
    alone = family_of(given).read(given, Weights(frozenset(), False))
    assert alone == read() == read(**values)


def test_null_ids_mean_what_transformers_makes_of_them_when_it_generates() -> None:
    config = read(pad_token_id=None, eos_token_id=[3, 4], decoder_start_token_id=None)
    assert (config.pad_token_id, config.decoder_start_token_id) == (3, 3)
    assert read(decoder_start_token_id=None, bos_token_id=7).decoder_start_token_id == 7
    assert read(pad_token_id=1).decoder_start_token_id == 1, "T5 starts with padding"
    assert read(pad_token_id=None, eos_token_id=None).pad_token_id == 0


@pytest.mark.parametrize("model_type", ["t5", "umt5", "mt5"])
@pytest.mark.parametrize(
    ("fields", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("own_head", [False, True])
def test_outputs_are_scaled_as_the_file_says(
    model_type: str, fields: dict[str, Any], scaled: bool, own_head: bool
) -> None:
    config = read(model_type=model_type, own_head=own_head, **fields)
    if model_type == "mt5" and "scale_decoder_outputs" not in fields:
        scaled = False
    assert config.scales_logits is scaled
    assert config.tie_word_embeddings is not own_head
    family = layout_for(config)
    written = family.write(config, "conditional_generation")
    names = frozenset({"decoder.block.0.layer.0.layer_norm.weight"})
    assert family_of(written).read(written, Weights(names, own_head)).scales_logits is scaled


EXTRA: dict[str, Any] = {
    "task_specific_params": {"summarization": {"prefix": "summarize: ", "num_beams": 4}},
    "n_positions": 512,
    "id2label": {"0": "no", "1": "yes"},
    "custom": ["mine", None],
    "bos_token_id": 7,
}


def with_extra(path: Path) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **EXTRA}))
    return path


def kept(path: Path) -> bool:
    values = json.loads((path / "config.json").read_text())
    return {name: values.get(name) for name in EXTRA} == EXTRA


@pytest.mark.parametrize("layout", ["auto", "moezoo"])
def test_fields_that_mean_nothing_here_are_kept_by_every_verb(layout: str, tmp_path: Path) -> None:
    moezoo.save(tiny(num_experts=0), tmp_path / "t5")
    source = with_extra(tmp_path / "t5")
    moezoo.save(moezoo.load(source), tmp_path / "saved", layout=layout)
    moezoo.upcycle(source, tmp_path / "up", num_experts=2, layout=layout)
    moezoo.downcycle(tmp_path / "up", tmp_path / "down")
    export(tmp_path / "up", tmp_path / "export", layout="moezoo")
    live = moezoo.upcycle(moezoo.load(source), num_experts=2)
    moezoo.save(live, tmp_path / "live")
    for name in ("saved", "up", "down", "export", "live"):
        assert kept(tmp_path / name), name
    loaded = moezoo.load(tmp_path / "export")
    assert loaded.config.other_fields["bos_token_id"] == 7
    hf = pytest.importorskip("moezoo.adapters.hf")
    hf.MoezooForConditionalGeneration.wrap(loaded).save_pretrained(tmp_path / "wrapped")
    assert kept(tmp_path / "wrapped")


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
def test_a_dropout_of_one_drops_everything_and_stays_finite(num_experts: int, act: str) -> None:
    config = read(dropout_rate=1.0, feed_forward_proj=act).replace(num_experts=num_experts)
    model = moezoo.build(config, seed=0).train()
    ids = torch.randint(2, 61, (2, 5))
    out = model(ids, labels=ids)
    out.loss.backward()
    assert torch.isfinite(out.loss) and not out.logits.any()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    assert model(ids, labels=ids).logits.any()


@pytest.mark.parametrize("layout", ["huggingface", "moezoo"])
@pytest.mark.parametrize("scale", [None, 0.1, 0.5])
def test_how_a_small_model_was_drawn_is_kept_and_a_file_of_before_has_the_papers_scale(
    layout: str, scale: float | None, tmp_path: Path
) -> None:
    moezoo.save(tiny(initializer_scale=scale), tmp_path / "out", layout=layout)
    assert moezoo.load(tmp_path / "out").config.initializer_scale == scale
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    assert ("moezoo_config" in values) == (layout == "moezoo" or scale != 0.1)
    values.get("moezoo_config", {}).pop("initializer_scale", None)
    path.write_text(json.dumps(values))
    assert moezoo.load(tmp_path / "out").config.initializer_scale == 0.1
