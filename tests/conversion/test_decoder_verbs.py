"""Merging, growing, shrinking and exporting decoders; routers from prompts; the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import moezoo
from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.upcycle import downcycle, upcycle
from moezoo.adapters.upcycle.calibration import Calibration, layer_inputs, read_calibration
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.grow import grow
from moezoo.adapters.upcycle.merge import merge
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.upcycle.shrink import shrink
from moezoo.adapters.verify import verify
from moezoo.cli import main
from moezoo.errors import ConfigError, MoezooError
from tests.conversion.decoders import dense_decoder, loaded, logits, relative

SIBLINGS = ["llama", "qwen2", "granite", "ernie4_5", "youtu", "smollm3", "granitemoehybrid"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def trained(path: Path, *, seed: int = 3) -> Path:
    """The sparse model at `path` with experts, routers and all the rest made unlike."""
    generator = torch.Generator().manual_seed(seed)
    held = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights(path).items()
    }
    save_file(held, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(params=SIBLINGS)
def sparse(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A sparse decoder whose experts and routers differ."""
    upcycle(dense_decoder(tmp_path / "dense", request.param), tmp_path / "moe", num_experts=4)
    return trained(tmp_path / "moe")


def test_a_grown_model_computes_the_same_with_all_twins_of_those_that_were_chosen(
    sparse: Path, tmp_path: Path
) -> None:
    grow(sparse, tmp_path / "grown", factor=2)
    assert relative(logits(tmp_path / "grown"), logits(sparse)) < 1e-5
    with open_checkpoint(tmp_path / "grown") as made:
        assert (made.config.num_experts, made.config.choices) == (8, 4)  # type: ignore[attr-defined]


def test_a_grown_model_shrinks_to_what_it_was(sparse: Path, tmp_path: Path) -> None:
    grow(sparse, tmp_path / "grown", factor=2, noise=0.0)
    shrink(tmp_path / "grown", tmp_path / "small", num_experts=4)
    before, after = weights(sparse), weights(tmp_path / "small")
    assert set(before) == set(after)
    assert all(torch.allclose(t, after[name], atol=1e-6) for name, t in before.items())
    with pytest.raises(ConfigError, match=r"every token goes to 4 experts; expected >= 4, found 3"):
        shrink(tmp_path / "grown", tmp_path / "less", num_experts=3)
    assert not (tmp_path / "less").exists()


def test_deepseek_shrinks_to_two_experts_and_not_to_one(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "youtu")
    upcycle(source, tmp_path / "moe", num_experts=4, router={"name": "top_k", "k": 1})
    with pytest.raises(MoezooError, match="deepseek_v3 cannot choose among fewer.*>= 2, found 1"):
        shrink(tmp_path / "moe", tmp_path / "small", num_experts=1)
    assert not (tmp_path / "small").exists()
    shrink(tmp_path / "moe", tmp_path / "small", num_experts=2)
    assert relative(logits(tmp_path / "small"), logits(source)) < 1e-5


def test_a_dense_model_does_not_shrink(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"the model is dense. Use `moezoo upcycle`"):
        shrink(source, tmp_path / "small", num_experts=1)


def test_verification_shows_no_bars_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_decoder(tmp_path / "dense")
    upcycle(source, tmp_path / "moe", num_experts=2)
    logging.enable_progress_bar()
    try:
        assert main(["verify", str(tmp_path / "moe"), "--against", str(source)]) == 0
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    shown = capsys.readouterr()
    assert "logits within" in shown.out
    assert not shown.err
    assert main(["plan", str(source), "--experts", "2"]) == 0
    assert "Hugging Face layout   mixtral" in capsys.readouterr().out


def test_a_fresh_upcycling_shrinks_to_the_same_function(tmp_path: Path) -> None:
    for family in SIBLINGS:
        source = dense_decoder(tmp_path / family, family)
        upcycle(source, tmp_path / f"{family}-moe", num_experts=4)
        shrink(tmp_path / f"{family}-moe", tmp_path / f"{family}-2", num_experts=2)
        assert relative(logits(tmp_path / f"{family}-2"), logits(source)) < 1e-5


def test_an_export_keeps_every_tensor_and_gives_one_expert(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "granite")
    upcycle(source, tmp_path / "moe", num_experts=2)
    trained(tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "half", dtype="bfloat16")
    before, after = weights(tmp_path / "moe"), weights(tmp_path / "half")
    assert set(before) == set(after)
    assert all(torch.equal(t.bfloat16(), after[name]) for name, t in before.items())
    export(tmp_path / "moe", tmp_path / "one", expert=1)
    one = weights(tmp_path / "one")
    fused = before["model.layers.1.block_sparse_moe.input_linear.weight"]
    assert torch.equal(one["model.layers.1.mlp.up_proj.weight"], fused[1, 24:])
    assert loaded(tmp_path / "one").config.model_type == "granite"
    export(tmp_path / "moe", tmp_path / "wide", vocab_size=70)
    wide = loaded(tmp_path / "wide")
    assert wide.config.vocab_size == 70
    table = before["model.embed_tokens.weight"]
    assert torch.equal(wide.model.embed_tokens.weight[:61], table)


@pytest.mark.parametrize("family", ["qwen2", "granite"])
def test_what_was_exported_is_verified_against_the_dense_model(family: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    upcycle(source, tmp_path / "moe", num_experts=2)
    export(tmp_path / "moe", tmp_path / "half", dtype="bfloat16")
    assert verify(tmp_path / "half", source).passed
    export(tmp_path / "half", tmp_path / "wide", vocab_size=70)
    assert verify(tmp_path / "wide", source).passed


def test_one_expert_of_a_published_sparse_model_is_a_dense_one(tmp_path: Path) -> None:
    """Without provenance: the dense class that the sparse one comes from."""
    upcycle(dense_decoder(tmp_path / "dense"), tmp_path / "moe", num_experts=2)
    file = tmp_path / "moe" / "config.json"
    values = json.loads(file.read_text())
    values.pop("moezoo_provenance")
    file.write_text(json.dumps(values))
    export(tmp_path / "moe", tmp_path / "one", expert=0)
    assert loaded(tmp_path / "one").config.model_type == "mistral"
    assert relative(logits(tmp_path / "one"), logits(tmp_path / "dense")) < 1e-6


def test_a_dense_granite_4_and_a_sparse_one_are_told_apart(tmp_path: Path) -> None:
    """By the number of experts alone: they are one class. Without provenance it is told too."""
    source = dense_decoder(tmp_path / "dense", "granitemoehybrid")
    upcycle(source, tmp_path / "moe", num_experts=2)
    for folder, count in (("dense", 0), ("moe", 2)):
        with open_checkpoint(tmp_path / folder) as found:
            assert found.config.num_experts == count
    with pytest.raises(MoezooError, match="a mixture of experts already"):
        upcycle(tmp_path / "moe", tmp_path / "again", num_experts=4)
    file = tmp_path / "moe" / "config.json"
    values = json.loads(file.read_text())
    values.pop("moezoo_provenance")
    file.write_text(json.dumps(values))
    downcycle(tmp_path / "moe", tmp_path / "back")
    assert relative(logits(tmp_path / "back"), logits(source)) < 1e-6
    held = weights(tmp_path / "moe")
    held["model.layers.1.shared_mlp.input_linear.weight"][30, 3] += 1.0
    save_file(held, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoezooError, match="the experts differ"):
        downcycle(tmp_path / "moe")


def test_what_a_sibling_has_besides_goes_with_it(tmp_path: Path) -> None:
    """A SmolLM3 has no sinks: one expert of its sibling has none, and trained ones stay."""
    source = dense_decoder(tmp_path / "dense", "smollm3")
    upcycle(source, tmp_path / "moe", num_experts=2, dtype="bfloat16")
    sinks = "model.layers.1.self_attn.sinks"
    assert weights(tmp_path / "moe")[sinks].tolist() == [-16384.0] * 4
    export(tmp_path / "moe", tmp_path / "one", expert=1)
    assert set(weights(tmp_path / "one")) == set(weights(source))
    assert loaded(tmp_path / "one").config.model_type == "smollm3"
    held = weights(tmp_path / "moe")
    held[sinks] += 128.0
    save_file(held, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    assert not verify(tmp_path / "moe", source, levels=[2]).passed
    with pytest.raises(MoezooError, match=r"sinks' is not -16384: it was trained"):
        downcycle(tmp_path / "moe")


def test_an_expert_is_no_model_where_all_tokens_pass_another(tmp_path: Path) -> None:
    upcycle(dense_decoder(tmp_path / "dense", "qwen2"), tmp_path / "moe", num_experts=2)
    with pytest.raises(ConfigError, match="qwen2_moe adds what all tokens pass"):
        export(tmp_path / "moe", tmp_path / "one", expert=0)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    "name", ["mlp.shared_expert_gate.weight", "mlp.shared_expert.up_proj.weight"]
)
def test_a_model_that_was_trained_does_not_go_back(name: str, tmp_path: Path) -> None:
    upcycle(dense_decoder(tmp_path / "dense", "qwen2"), tmp_path / "moe", num_experts=2)
    held = weights(tmp_path / "moe")
    held[f"model.layers.1.{name}"][0, 3] += 1.0
    save_file(held, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoezooError, match="trained"):
        downcycle(tmp_path / "moe")
    assert not verify(tmp_path / "moe", tmp_path / "dense", levels=[2]).passed


def test_equal_branches_give_what_upcycling_one_gives(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "granite"):
        source = dense_decoder(tmp_path / family, family)
        upcycle(source, tmp_path / f"{family}-one", num_experts=2)
        merge([source, source], tmp_path / f"{family}-two", Recipe(2, init="branches"))
        one, two = weights(tmp_path / f"{family}-one"), weights(tmp_path / f"{family}-two")
        assert set(one) == set(two)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
        loaded(tmp_path / f"{family}-two")


def test_branches_become_experts_and_the_rest_is_their_mean(tmp_path: Path) -> None:
    paths = [dense_decoder(tmp_path / str(i), "qwen2", seed=i) for i in range(2)]
    merge(paths, tmp_path / "moe", Recipe(4, init="branches"))
    first, second, made = (weights(path) for path in (*paths, tmp_path / "moe"))
    start = "model.layers.1.mlp."
    for expert, branch in enumerate((first, second, first, second)):
        down = made[f"{start}experts.{expert}.down_proj.weight"]
        assert torch.equal(down, 0.5 * branch[f"{start}down_proj.weight"])
    mean = (first[f"{start}down_proj.weight"].double() + second[f"{start}down_proj.weight"]) / 2
    assert torch.equal(made[f"{start}shared_expert.down_proj.weight"], mean.float())
    table = "model.embed_tokens.weight"
    assert torch.equal(made[table], ((first[table].double() + second[table]) / 2).float())
    loaded(tmp_path / "moe")


def test_models_of_other_shapes_are_not_merged(tmp_path: Path) -> None:
    one = dense_decoder(tmp_path / "one")
    wide = dense_decoder(tmp_path / "wide", vocab_size=70)
    other = dense_decoder(tmp_path / "other", "mistral")
    for path, field in ((wide, "vocab_size"), (other, "model_type")):
        with pytest.raises(ConfigError, match=field) as caught:
            merge([one, path], tmp_path / "moe", Recipe(2, init="branches"))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "moe").exists()


def prompts(path: Path, groups: Any) -> Path:
    path.write_text(json.dumps(groups))
    return path


@pytest.mark.parametrize("inputs", ["model", "embeddings"])
def test_routers_send_prompts_to_their_experts(inputs: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "qwen3")
    groups = [{"positive": [[5, 9, 12]], "negative": [[33, 40]]}, {"positive": [[33, 40]]}]
    sample = read_calibration(prompts(tmp_path / "p.json", groups), source, inputs=inputs)
    assert list(sample.experts or ()) == [0, -1, 1]
    upcycle(source, tmp_path / "moe", num_experts=2, router_init="prompts", calibration=sample,
            router={"name": "top_k", "k": 1})  # fmt: skip
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    model = loaded(tmp_path / "moe")
    if inputs == "model":
        seen = []
        model.model.layers[1].mlp.gate.register_forward_hook(lambda *call: seen.append(call[2][2]))
        for prompt in ([5, 9, 12], [33, 40]):
            model(torch.tensor([prompt]))
        assert [chosen.float().mean().round().item() for chosen in seen] == [0.0, 1.0]


def test_embeddings_are_the_rows_that_the_ids_name_and_need_no_model(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "qwen3")
    sample = Calibration([[5, 9], [33]], experts=[0, 1], inputs="embeddings")
    with open_checkpoint(source) as checkpoint:
        found = layer_inputs(checkpoint, sample, ["decoder.blocks.0.mlp", "decoder.blocks.1.mlp"])
        table = weights(source)["model.embed_tokens.weight"]
        for entry in found.values():
            assert torch.equal(entry.inputs, table[[5, 9, 33]])
        with pytest.raises(ConfigError, match=r"expected ids below 61, found 99"):
            layer_inputs(checkpoint, Calibration([[99]], inputs="embeddings"), ["any"])


def test_negative_prompts_turn_a_router_away(tmp_path: Path) -> None:
    from moezoo.adapters.upcycle.inits import router_inits

    x = torch.eye(4)
    init = router_inits.build({"name": "prompts", "std": 1.0})
    owners = torch.tensor([0, 1, -1, -2])
    rows = torch.tensor(init.rows(2, 4, key="k", seed=0, inputs=x, experts=owners)).view(2, 4)
    scores = rows @ x.T
    assert scores[0, 0] > 0 > scores[0, 2]
    assert scores[1, 1] > 0 > scores[1, 3]
    with pytest.raises(ConfigError, match="prompts are needed"):
        init.rows(2, 4, key="k", seed=0, inputs=x, experts=torch.tensor([0, 1, -1, -9]))


def test_a_model_is_calibrated_by_its_own_layers(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "llama")
    sample = Calibration([[5, 9, 12, 1], [7, 20, 41, 1]])
    with open_checkpoint(source) as checkpoint:
        found = layer_inputs(checkpoint, sample, ["decoder.blocks.1.mlp"])
    seen: list[torch.Tensor] = []
    model = loaded(source)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    with torch.no_grad():
        for sequence in sample.sequences:
            model(torch.tensor([sequence]))
    torch.testing.assert_close(found["decoder.blocks.1.mlp"].inputs, torch.cat(seen))


def test_the_command_line_takes_a_llama_through_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, moe = str(dense_decoder(tmp_path / "llama")), str(tmp_path / "moe")
    assert main(["plan", source, "--experts", "8"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.*.block_sparse_moe.experts.*.w1" in shown
    assert main(["upcycle", source, moe, "--experts", "8", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "layout Hugging Face Mixtral" in shown
    assert "no tensor missing or unexpected" in shown
    assert main(["verify", moe, "--against", source, "--levels", "1,2,3"]) == 0
    assert main(["downcycle", moe, str(tmp_path / "back")]) == 0
    assert main(["grow", moe, str(tmp_path / "big")]) == 0
    assert main(["shrink", moe, str(tmp_path / "small"), "--experts", "4"]) == 0
    assert main(["export", moe, str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert main(["merge", source, source, "--out", str(tmp_path / "merged")]) == 0
    prompts(tmp_path / "p.json", [[[5, 9]], [[33]]])
    words = ["--calibration", str(tmp_path / "p.json"), "--inputs", "embeddings"]
    words += ["--router-init", "prompts", "--experts", "2", "--overwrite"]
    assert main(["upcycle", source, moe, *words]) == 0
    with pytest.raises(MoezooError, match="not a model of the T5 family"):
        moezoo.load(source)
