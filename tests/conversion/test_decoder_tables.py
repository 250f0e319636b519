"""The tables of decoders say what the classes of transformers say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moezoo.adapters.families.decoder_config import DecoderConfig
from moezoo.adapters.families.decoder_placement import (
    INTERVAL,
    STEPS,
    TYPES,
    Placement,
    trailing,
)
from moezoo.adapters.families.decoders import decoder_family
from moezoo.adapters.families.dense_decoders import DENSE
from moezoo.adapters.families.sparse_decoders import ALIASES, SPARSE
from moezoo.adapters.fused import whole_name
from moezoo.adapters.tensor_files import TensorPlan, wholes
from moezoo.frozen import frozen
from tests.conversion.decoders import GRANITE_4, SIZES

# Fields of every config of transformers, which say nothing of what a model computes.
_GENERAL = set(AutoConfig.for_model("gpt2").to_dict()) & set(AutoConfig.for_model("bert").to_dict())
_SIZED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "max_position_embeddings"}  # fmt: skip
# What a class derives from other fields, or from RoPE's own.
_DERIVED = {"rope_parameters", "layer_types", "layer_rope_theta", "mlp_layer_types", "rope_theta",
            "rope_scaling", "moe_intermediate_size", "shared_expert_intermediate_size",
            "prefix_dense_intermediate_size", "mlp_only_layers", "decoder_sparse_step",
            "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval",
            "first_k_dense_replace", "num_dense_layers"}  # fmt: skip
# What a class works out in its constructor, and what a row says of it where a file is silent.
_WORKED_OUT = {"initializer_range", "attention_multiplier", "no_rope_layers", "full_attn_idxs"}
_OLD = {"tie_embedding"}  # what files of a class called a field, and it still reads
_OF_ROPE = {"partial_rotary_factor", "rope_type", "type"}


def fields(model_type: str) -> dict[str, Any]:
    """What the class of a `model_type` assumes where config.json is silent, as it writes it."""
    made: dict[str, Any] = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    return {name: value for name, value in made.items() if name not in {"model_type", "dtype"}}


class Read(dict[str, Any]):
    """Fields of config.json that remembers which were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("model_type", DENSE)
def test_a_row_assumes_what_the_class_does(model_type: str) -> None:
    kind, assumed = DENSE[model_type], fields(model_type)
    sizes = {name: assumed[name] for name in _SIZED if name in assumed}
    dense = {name: value for name, value in kind.plain.items() if name == "num_local_experts"}
    full = DecoderConfig(frozen({**sizes, **dense, "model_type": model_type})).full
    assumed |= dense
    for name in kind.defaults:
        if name in assumed:
            unused = name == "sliding_window" and not full.get("use_sliding_window", True)
            derived = name == "head_dim" and assumed[name] is None  # None: width by heads
            derived |= full[name] is None and name in _WORKED_OUT
            derived |= name == "head_dim" and name in kind.says(full)
            assert unused or derived or full[name] == assumed[name], name
    base = assumed["rope_parameters"].get("rope_theta", kind.theta)
    found = full["rope_parameters" if "rope_parameters" in kind.defaults else "rope_theta"]
    assert found == (assumed["rope_parameters"] if isinstance(found, dict) else kind.theta)
    assert base == kind.theta
    if kind.layer_types is not None:
        assert full["layer_types"] == assumed["layer_types"]


@pytest.mark.parametrize("model_type", DENSE)
def test_every_field_of_a_dense_class_is_carried_or_refused_by_name(model_type: str) -> None:
    kind = DENSE[model_type]
    ours, theirs = set(fields(model_type)), set(fields(kind.sibling))
    lost = ours - theirs - _GENERAL - {"head_dim"}  # which every attention reads where it is there
    one = (
        {"max_window_layers", "layer_types", "sliding_window"} if kind.windows != "each" else set()
    )
    old = set(CONFIG_MAPPING[model_type].attribute_map)  # what files of other libraries call them
    said = Read(DecoderConfig(frozen({**fields(model_type), "model_type": model_type})).full)
    kind.says(said)
    lost -= said.names
    assert lost - one == {*kind.only, *kind.ignored} - theirs - old - _OF_ROPE - _OLD
    assert lost <= {*kind.only, *kind.ignored, *one}


@pytest.mark.parametrize("model_type", DENSE)
def test_every_field_of_a_sparse_class_is_set_where_the_dense_one_lacks_it(model_type: str) -> None:
    kind = DENSE[model_type]
    sparse = SPARSE[kind.sibling]
    new = set(fields(sparse.model_type)) - set(fields(model_type)) - _GENERAL - _DERIVED
    said = kind.says(DecoderConfig(frozen({**fields(model_type), "model_type": model_type})).full)
    written = {*sparse.sets, *sparse.experts, sparse.choices, *kind.fixed, *said}
    assert new - {"head_dim"} <= written, new - written  # spelled out by `full`
    aliases = set(CONFIG_MAPPING[sparse.model_type].attribute_map) - {"layers_block_type"}
    assert aliases <= {*ALIASES}
    assert {sparse.width, *filter(None, (sparse.shared_width,))} <= set(fields(sparse.model_type))


@pytest.mark.parametrize("model_type", DENSE)
def test_every_field_that_both_have_is_spelled_out(model_type: str) -> None:
    """A default that the two classes do not share must never be left to the sibling."""
    kind = DENSE[model_type]
    ours, theirs = fields(model_type), fields(kind.sibling)
    differ = {n for n in set(ours) & set(theirs) if ours[n] != theirs[n]} - _SIZED - _DERIVED
    assert differ <= {*kind.defaults, *kind.fixed}, differ


@pytest.mark.parametrize("model_type", [*DENSE, *SPARSE])
def test_classes_are_those_that_transformers_has_for_text(model_type: str) -> None:
    kind = DENSE.get(model_type) or SPARSE[model_type]
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == kind.architecture
    if model_type in SPARSE:
        assert DENSE[SPARSE[model_type].dense].sibling == model_type


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("model_type", DENSE)
def test_names_and_shapes_are_those_of_the_dense_class(model_type: str, biases: bool) -> None:
    options: dict[str, Any] = {}
    if biases and "attention_bias" in fields(model_type):
        options = {"attention_bias": True}
    if "attention_bias" in DENSE[model_type].only:
        options = {}
    if model_type in ("hunyuan_v1_dense", "ministral"):
        options["head_dim"] = 8  # without, the class cannot be built
    if model_type == "helium":
        options["head_dim"] = 4  # whose heads are as wide as the model, or it cannot run
    only = {name: value for name, value in DENSE[model_type].only.items() if name not in _OF_ROPE}
    if model_type == "granitemoehybrid":
        options |= GRANITE_4
    config = AutoConfig.for_model(model_type, **{**SIZES, **only, **options})
    model = AutoModelForCausalLM.from_config(config)
    family = decoder_family(config.to_dict())
    assert family is not None
    ours = DecoderConfig(frozen(config.to_dict()))
    parts = [TensorPlan(family.disk_names(n)[0], "F32", s)
             for n, s in family.shapes(ours, "any").items()]  # fmt: skip
    shapes = {plan.name: plan.shape for plan in wholes(parts)}
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if ours.tied:
        theirs.pop("lm_head.weight")
    assert shapes == theirs


def test_parts_of_a_fused_tensor_are_called_after_it() -> None:
    family = decoder_family({"model_type": "granitemoe"})
    assert family is not None
    names = family.disk_names("decoder.blocks.3.mlp.experts.wi_1", num_experts=2)
    assert {whole_name(n) for n in names} == {"model.layers.3.block_sparse_moe.input_linear.weight"}
    assert len(set(names)) == 2


_RULES = {"steps": STEPS, "interval": INTERVAL, "types": TYPES, "trailing": trailing("first", 3)}


@pytest.mark.parametrize("rule", _RULES.values(), ids=_RULES)
def test_a_placement_reads_back_as_it_was_written(rule: Placement) -> None:
    count = 6
    for number in range(1, 1 << count):
        layers = tuple(i for i in range(count) if number >> i & 1)
        written = rule.write(layers, count)
        if rule not in (INTERVAL, _RULES["trailing"]):
            assert written is not None
        if written is not None:
            assert rule.read(written, count) == layers


def test_an_interval_is_what_ernie_places() -> None:
    """The class itself, for every placement that can be said."""
    for layers in ((1, 3), (0, 1, 2, 3), (2,), (1, 2)):
        written = INTERVAL.write(layers, 4)
        assert written is not None
        sizes = {**SIZES, **written, "num_hidden_layers": 4, "moe_num_experts": 2, "moe_k": 1}
        config = AutoConfig.for_model("ernie4_5_moe", **sizes)
        model = AutoModelForCausalLM.from_config(config)
        sparse = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        assert tuple(sparse) == layers
    assert INTERVAL.write((0, 3), 4) is None
