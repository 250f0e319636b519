"""Verification finds what is wrong, level by level."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.verify import verify
from moezoo.cli import main
from moezoo.errors import ConfigError
from tests.conversion.dense import dense_t5


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = dense_t5(tmp_path / "dense")
    convert(source, tmp_path / "out", Recipe(4))
    return source, tmp_path / "out"


def spoil(out: Path, name: str, change: float) -> None:
    file = out / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] += change
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "umt5"])
@pytest.mark.parametrize("init", ["copy", "drop:0.5", "virtual_group:2"])
def test_a_sound_conversion_passes_all_levels(family: str, init: str, tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense", family)
    convert(source, tmp_path / "out", Recipe(4, init=init, dtype="float32"))
    found = verify(tmp_path / "out", source)
    assert found.passed, found.line
    assert [result.level for result in found.results] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deep_model_may_differ_by_more_than_a_layer_and_a_wrong_factor_is_still_found(
    dtype: str, tmp_path: Path
) -> None:
    source = dense_t5(tmp_path / "dense", "t5_v1_1", num_layers=8, d_model=64, d_ff=128)
    convert(source, tmp_path / "out", Recipe(8, layers="all", dtype=dtype))
    found = verify(tmp_path / "out", source, levels=[3, 4])
    assert found.passed, found.line
    assert found.results[1].numbers["error"] > found.results[0].numbers["error"]
    name = "encoder.block.3.layer.1.mlp.experts.expert_{}.wo.weight"
    tensors = load_file(tmp_path / "out/model.safetensors")
    for expert in range(8):
        tensors[name.format(expert)] *= 1.5
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    assert not verify(tmp_path / "out", source, levels=[3]).passed
    assert not verify(tmp_path / "out", source, levels=[4]).passed or dtype == "bfloat16"


def test_a_changed_copy_is_found_by_its_bytes(pair: tuple[Path, Path]) -> None:
    source, out = pair
    name = "encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight"
    spoil(out, name, 1e-4)
    found = verify(out, source, levels=[2])
    assert not found.passed and name in found.line


def test_a_changed_expert_is_found_by_its_function(pair: tuple[Path, Path]) -> None:
    source, out = pair
    spoil(out, "decoder.block.1.layer.2.mlp.experts.expert_0.wi.weight", 9.0)
    results = verify(out, source, levels=[1, 3]).results
    assert results[0].passed and not results[1].passed


def test_a_wrong_router_is_found_by_the_logits(pair: tuple[Path, Path]) -> None:
    source, out = pair
    spoil(out, "encoder.block.1.layer.1.mlp.router.classifier.weight", 5.0)
    assert not verify(out, source, levels=[4]).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_changed_router_is_found_by_its_bytes(dtype: str, tmp_path: Path) -> None:
    source, out = dense_t5(tmp_path / "dense"), tmp_path / "out"
    convert(source, out, Recipe(4, dtype=dtype, router_init={"name": "normal", "std": 0.01}))
    assert verify(out, source, levels=[2]).passed
    name = "decoder.block.1.layer.2.mlp.router.classifier.weight"
    spoil(out, name, 1e-2)
    found = verify(out, source, levels=[2])
    assert not found.passed and name in found.line


def test_another_source_is_found(pair: tuple[Path, Path]) -> None:
    source, out = pair
    spoil(source, "shared.weight", 0.5)
    found = verify(out, source, levels=[2])
    assert not found.passed and "not the one it was made from" in found.line


def test_the_verb_says_it_in_one_line_json_and_exit_code(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = map(str, pair)
    assert main(["verify", out, "--against", source]) == 0
    line = capsys.readouterr().out
    assert line.startswith("verified: ") and line.count("\n") == 1
    spoil(pair[1], "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight", 1.0)
    assert main(["verify", out, "--against", source, "--levels", "2", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_unknown_levels_and_models_without_a_recipe_are_refused(pair: tuple[Path, Path]) -> None:
    source, out = pair
    with pytest.raises(ConfigError, match="level"):
        verify(out, source, levels=[6])
    with pytest.raises(ConfigError, match="no recipe"):
        verify(source, source)


def test_upcycle_can_verify_before_it_commits(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    assert main(["upcycle", str(source), str(tmp_path / "out"), "--experts", "4", "--verify"]) == 0
    made = json.loads((tmp_path / "out/config.json").read_text())["moezoo_provenance"]
    assert made["verification"].startswith("verified: ")
    assert torch.get_num_threads() >= 1


def test_a_result_that_is_refused_is_called_by_its_name_and_its_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = dense_t5(tmp_path / "t5"), tmp_path / "out"
    # Routers that are not zero weigh the experts by other than 1 / E.
    words = ["upcycle", str(source), str(out), "--experts", "4", "--router-init", "normal:0.5"]
    code = main([*words, "--verify"])
    said = capsys.readouterr().err
    assert code == 3 and not out.exists() and f"{out}: NOT verified: level " in said
    assert "partial" not in said and "Nothing was written" in said
