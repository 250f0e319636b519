"""One verb after another on a decoder: what the first has made is what the second knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.upcycle import downcycle, upcycle
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.grow import grow
from moezoo.adapters.upcycle.shrink import shrink
from moezoo.errors import MoezooError
from tests.conversion.decoders import SIZES, dense_decoder, edit_config, loaded, logits, relative


def same_weights(one: Path, other: Path) -> bool:
    before, after = (load_file(path / "model.safetensors") for path in (one, other))
    return set(before) == set(after) and all(torch.equal(t, after[n]) for n, t in before.items())


def trained(source: Path, out: Path) -> Path:
    """The checkpoint as a training would leave it, saved by transformers."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "lfm2", "youtu"])
def test_what_grew_shrinks_to_the_function_that_it_had(family: str, tmp_path: Path) -> None:
    upcycle(dense_decoder(tmp_path / "dense", family), tmp_path / "moe", num_experts=3)
    moe = trained(tmp_path / "moe", tmp_path / "trained")
    expected = logits(moe)
    grow(moe, tmp_path / "grown", factor=4)
    export(tmp_path / "grown", tmp_path / "again")
    shrink(tmp_path / "again", tmp_path / "half", num_experts=6)
    shrink(tmp_path / "half", tmp_path / "small", num_experts=3)
    for name, choices in (("grown", 8), ("half", 4), ("small", 2)):
        with open_checkpoint(tmp_path / name) as made:
            assert made.config.choices == choices  # type: ignore[attr-defined]
        assert relative(logits(tmp_path / name), expected) < 1e-4, name
    with pytest.raises(MoezooError, match="every token goes to 2 experts"):
        shrink(tmp_path / "small", tmp_path / "less", num_experts=1)


@pytest.mark.parametrize("init", ["split", "virtual_group:2"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_a_factor_is_known_after_an_export(family: str, init: str, tmp_path: Path) -> None:
    """A provenance of before, too, which did not say it again."""
    source = dense_decoder(tmp_path / "dense", family, intermediate_size=32)
    upcycle(source, tmp_path / "moe", num_experts=4, init=init)
    export(tmp_path / "moe", tmp_path / "again", dtype="float32")
    downcycle(tmp_path / "again", tmp_path / "back")
    assert same_weights(source, tmp_path / "back")
    with open_checkpoint(tmp_path / "again") as made:
        told = dict(made.description.values["moezoo_provenance"])
    del told["wo_scale"]
    edit_config(tmp_path / "again", moezoo_provenance=told)
    downcycle(tmp_path / "again", tmp_path / "back-too")
    assert same_weights(source, tmp_path / "back-too")


def test_one_slice_is_no_layer(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", intermediate_size=32)
    upcycle(source, tmp_path / "moe", num_experts=4, init="split")
    with pytest.raises(MoezooError, match="one of 4 slices of a dense layer.*downcycle"):
        export(tmp_path / "moe", tmp_path / "one", expert=0)
    assert not (tmp_path / "one").exists()


def published(path: Path, model_type: str, **options: Any) -> Path:
    """A sparse model of random weights, as its authors would save it."""
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
           "norm_topk_prob": True}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **own, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("width", [8, 32])
def test_an_expert_of_a_published_model_has_a_width_of_its_own(width: int, tmp_path: Path) -> None:
    """Which `intermediate_size` says nothing of where all layers have experts."""
    source = published(tmp_path / "moe", "qwen3_moe", moe_intermediate_size=width, head_dim=8)
    export(source, tmp_path / "one", expert=1)
    one = loaded(tmp_path / "one")
    assert one.config.intermediate_size == width
    held = load_file(source / "model.safetensors")
    up = held["model.layers.1.mlp.experts.1.up_proj.weight"]
    assert torch.equal(one.model.layers[1].mlp.up_proj.weight, up)
    with pytest.raises(MoezooError, match="the experts differ.*`moezoo export --expert N`"):
        downcycle(source, tmp_path / "back")
    equal = {n: held[n.replace("experts.1.", "experts.0.").replace("experts.2.", "experts.0.")
                     .replace("experts.3.", "experts.0.")] for n in held}  # fmt: skip
    save_file({n: t.clone() for n, t in equal.items()}, source / "model.safetensors")
    downcycle(source, tmp_path / "back")
    assert relative(logits(tmp_path / "back"), logits(source)) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3_moe", {"head_dim": 8, "mlp_only_layers": [0]}),
        ("qwen3_moe", {"head_dim": 8, "mlp_only_layers": [0], "moe_intermediate_size": 32}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 40}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    ],
)
def test_a_published_model_that_no_dense_one_is_in_is_refused(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = published(tmp_path / "moe", model_type, **options)
    for verb in (lambda out: downcycle(source, out), lambda out: export(source, out, expert=0)):
        with pytest.raises(MoezooError, match="no dense model has|experts differ|adds what all"):
            verb(tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "found"), [("pad_token_id", 60), ("eos_token_id", [2, 50])])
def test_a_special_id_keeps_its_row(field: str, found: Any, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", **{field: found})
    for path in (source, tmp_path / "moe"):
        with pytest.raises(MoezooError, match=f"{field} would have no row; expected > [56]0"):
            export(path, tmp_path / "small", vocab_size=50)
        assert not (tmp_path / "small").exists()
        if path is source:
            upcycle(source, tmp_path / "moe", num_experts=2)
    export(source, tmp_path / "less", vocab_size=61 if field == "pad_token_id" else 51)
    loaded(tmp_path / "less")
