"""Growing, shrinking, merging, exporting: what stays the same, stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moezoo
from moezoo import traces
from moezoo.adapters.upcycle.calibration import Calibration
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.grow import grow
from moezoo.adapters.upcycle.merge import merge
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.upcycle.shrink import shrink
from moezoo.cli import main
from moezoo.errors import ConfigError, NonFiniteWeights
from tests.conversion.dense import dense_t5, ids, relative


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A Switch model whose experts and routers differ."""
    torch.manual_seed(0)
    config = moezoo.SwitchConfig(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=3
    )
    model = moezoo.build(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    moezoo.save(model, tmp_path / "sparse")
    return tmp_path / "sparse"


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        model = moezoo.load(path, capacity="dropless")
        return model(ids(), decoder_input_ids=ids(seed=1)).logits


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_grown_model_computes_the_same(factor: int, sparse: Path, tmp_path: Path) -> None:
    grow(sparse, tmp_path / "out", factor=factor)
    model = moezoo.load(tmp_path / "out")
    assert model.config.num_experts == 3 * factor
    assert relative(logits(tmp_path / "out"), logits(sparse)) <= 1e-5


def test_twins_share_the_tokens(sparse: Path, tmp_path: Path) -> None:
    grow(sparse, tmp_path / "out", factor=2)
    model = moezoo.load(tmp_path / "out", capacity="dropless")
    with torch.no_grad(), moezoo.record(model) as tape:
        model(ids(32, 16), decoder_input_ids=ids(32, 16, seed=1))
    for (routing,) in tape.by_layer.values():
        load = torch.bincount(routing.assignment.expert, minlength=6).view(2, 3)
        busy = load.sum(0) > 60
        assert bool((load.min(0).values[busy] > 0).all())


BARS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_no_twin_is_dead_in_any_dtype_and_the_function_stays(
    std: float, factor: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = moezoo.SwitchConfig(
        vocab_size=61, d_model=64, d_kv=4, d_ff=32, num_heads=2, num_layers=2, num_experts=3
    )
    model = moezoo.build(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("classifier.weight"):
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    moezoo.save(model.to(dtype), tmp_path / "a")
    grow(tmp_path / "a", tmp_path / "out", factor=factor)
    before, after = (moezoo.load(tmp_path / n, capacity="dropless") for n in ("a", "out"))
    x = torch.randn(1, 3000 * factor, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layer in ("encoder.blocks.1.mlp", "decoder.blocks.1.mlp"):
        with torch.no_grad():
            expected, routed = before.get_submodule(layer)(x)
            found, routing = after.get_submodule(layer)(x)
        offered = torch.bincount(routed.assignment.expert, minlength=3)
        load = torch.bincount(routing.assignment.expert, minlength=3 * factor).view(factor, 3)
        assert bool((load * factor > 0.2 * offered).all())
        error = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
        assert float(error.median()) <= BARS[dtype]


def test_twins_of_a_fresh_upcycling_in_float16_are_told_apart(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "t5", d_model=64)
    moezoo.upcycle(source, tmp_path / "up", num_experts=4, dtype="float16")
    grow(tmp_path / "up", tmp_path / "out", factor=2)
    x = torch.randn(1, 4000, 64, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        _, routing = moezoo.load(tmp_path / "out").get_submodule("encoder.blocks.1.mlp")(x)
    load = torch.bincount(routing.assignment.expert, minlength=8)
    assert int(load.min()) > 100


def test_shrinking_what_was_grown_gives_the_function_back(sparse: Path, tmp_path: Path) -> None:
    grow(sparse, tmp_path / "large", factor=2)
    shrink(tmp_path / "large", tmp_path / "small", num_experts=3)
    assert relative(logits(tmp_path / "small"), logits(sparse)) <= 1e-5


def test_pruning_keeps_the_most_used_experts(sparse: Path, tmp_path: Path) -> None:
    model = moezoo.load(sparse, capacity="dropless")
    with torch.no_grad(), moezoo.record(model) as tape:
        model(ids(8, 16), decoder_input_ids=ids(8, 16))
    trace = traces.of(tape)
    shrink(sparse, tmp_path / "out", num_experts=2, trace=trace, method="prune")
    layer = "encoder.blocks.1.mlp"
    counts = torch.bincount(tape.by_layer[layer][0].assignment.expert, minlength=3)
    kept = counts.argsort(descending=True, stable=True)[:2].sort().values
    before, after = model.state_dict(), moezoo.load(tmp_path / "out").state_dict()
    assert torch.equal(before[f"{layer}.experts.wi"][kept], after[f"{layer}.experts.wi"])
    rows = f"{layer}.router.classifier.weight"
    assert torch.equal(before[rows][kept], after[rows])


def test_merging_equal_branches_is_upcycling_one(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "a")
    merge([source, dense_t5(tmp_path / "b")], tmp_path / "merged", Recipe(4, init="branches"))
    moezoo.upcycle(source, tmp_path / "up", num_experts=4)
    merged = load_file(tmp_path / "merged/model.safetensors")
    expected = load_file(tmp_path / "up/model.safetensors")
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_merged_branches_are_the_experts_and_the_rest_is_their_mean(tmp_path: Path) -> None:
    one = dense_t5(tmp_path / "a")
    other = dense_t5(tmp_path / "b")
    model = moezoo.load(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    moezoo.save(model, tmp_path / "c")
    merge([one, tmp_path / "c"], tmp_path / "out", Recipe(2, init="branches", preserve="none"))
    a, c = load_file(one / "model.safetensors"), load_file(tmp_path / "c/model.safetensors")
    made = load_file(tmp_path / "out/model.safetensors")
    name = "encoder.block.1.layer.1.{}.wi.weight"
    for expert, branch in enumerate((a, c)):
        found = made[name.format(f"mlp.experts.expert_{expert}")]
        assert torch.equal(found, branch[name.format("DenseReluDense")])
    assert torch.allclose(made["shared.weight"], (a["shared.weight"] + c["shared.weight"]) / 2)


def test_the_experts_of_a_merge_are_aimed_at_by_prompts(tmp_path: Path) -> None:
    paths = [dense_t5(tmp_path / name) for name in ("a", "b")]
    file = tmp_path / "prompts.json"
    file.write_text("[[[5, 9, 12, 1]], [[20, 41, 1], [33, 1]]]")
    spec = {"name": "prompts", "std": 1.0}
    sample = Calibration([[5, 9, 12, 1], [20, 41, 1], [33, 1]], experts=[0, 1, 1])
    recipe = Recipe(2, init="branches", router_init=spec, preserve="none")
    merge(paths, tmp_path / "out", recipe, calibration=sample)
    words = ["merge", *map(str, paths), "--router-init", "prompts:1.0", "--preserve", "none"]
    assert main([*words, "--out", str(tmp_path / "again"), "--calibration", str(file)]) == 0
    made = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    rows = made[0]["encoder.block.1.layer.1.mlp.router.classifier.weight"]
    assert torch.allclose(rows.norm(dim=1), torch.tensor(4.0)) and torch.allclose(rows[0], -rows[1])
    with pytest.raises(ConfigError, match="needs sample text"):
        merge(paths, tmp_path / "none", recipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_another_dtype_cannot_hold_is_refused_by_key(value: float, tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    tensors[name][2, 3] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for step in (
        lambda out: export(source, out, dtype="float16"),
        lambda out: merge([source, source], out, Recipe(2, init="branches", dtype="float16")),
    ):
        with pytest.raises(NonFiniteWeights, match=r"encoder.block.1.layer.1.*wo"):
            step(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    if value != 1e6:
        export(source, tmp_path / "out", dtype="float16", allow_nonfinite=True)


def test_a_saved_trace_decides_from_the_command_line(sparse: Path, tmp_path: Path) -> None:
    model = moezoo.load(sparse, capacity="dropless")
    with torch.no_grad(), moezoo.record(model) as tape:
        model(ids(8, 16), decoder_input_ids=ids(8, 16, seed=1))
    traces.of(tape).save(tmp_path / "run.safetensors")
    flags = ["--experts", "2", "--method", "prune", "--trace", str(tmp_path / "run.safetensors")]
    assert main(["shrink", str(sparse), str(tmp_path / "cli"), *flags]) == 0
    trace = traces.load(tmp_path / "run.safetensors")
    shrink(sparse, tmp_path / "api", num_experts=2, trace=trace, method="prune")
    made = [load_file(tmp_path / name / "model.safetensors") for name in ("cli", "api")]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    missing = [str(sparse), str(tmp_path / "no"), "--experts", "2", "--method", "prune"]
    assert main(["shrink", *missing]) == 2


def test_models_of_different_shape_do_not_merge(tmp_path: Path) -> None:
    paths = [dense_t5(tmp_path / "a"), dense_t5(tmp_path / "b", d_ff=32)]
    with pytest.raises(ConfigError, match="differ in shape"):
        merge(paths, tmp_path / "out", Recipe(2, init="branches"))
    with pytest.raises(ConfigError, match="at least two"):
        merge(paths[:1], tmp_path / "out", Recipe(2, init="branches"))


def test_export_moves_between_layouts_without_changing_a_byte(sparse: Path, tmp_path: Path) -> None:
    export(sparse, tmp_path / "ours", layout="moezoo")
    export(tmp_path / "ours", tmp_path / "theirs", layout="huggingface")
    for layout in ("ours", "theirs"):
        assert torch.equal(logits(tmp_path / layout), logits(sparse))
    before = load_file(sparse / "model.safetensors")
    after = load_file(tmp_path / "theirs/model.safetensors")
    assert set(before) == set(after) and all(torch.equal(before[n], after[n]) for n in before)


def test_a_layout_that_cannot_hold_a_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense", "t5_v1_1")
    moezoo.upcycle(source, tmp_path / "out", num_experts=2)
    with pytest.raises(ConfigError, match="cannot hold it.*no gated experts"):
        export(tmp_path / "out", tmp_path / "hf", layout="huggingface")


def test_a_single_expert_comes_out_as_a_dense_model(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    moezoo.upcycle(source, tmp_path / "out", num_experts=4, init="noise:0.1")
    export(tmp_path / "out", tmp_path / "one", expert=2)
    sparse = moezoo.load(tmp_path / "out").state_dict()
    dense = moezoo.load(tmp_path / "one").state_dict()
    layer = "decoder.blocks.1.mlp"
    assert torch.equal(dense[f"{layer}.wi.weight"], sparse[f"{layer}.experts.wi"][2])
    assert torch.equal(dense[f"{layer}.wo.weight"] * 4, sparse[f"{layer}.experts.wo"][2])
    with pytest.raises(ConfigError, match="no such expert"):
        export(tmp_path / "out", tmp_path / "none", expert=4)


def test_an_expert_that_was_never_upcycled_comes_out_as_it_is(sparse: Path, tmp_path: Path) -> None:
    words = ["export", str(sparse), str(tmp_path / "one"), "--expert", "1", "--wo-scale"]
    assert main([*words, "0"]) == 2
    assert main([*words, "1"]) == 0
    before, after = (moezoo.load(p).state_dict() for p in (sparse, tmp_path / "one"))
    layer = "encoder.blocks.1.mlp"
    for name in ("wi", "wo"):
        assert torch.equal(after[f"{layer}.{name}.weight"], before[f"{layer}.experts.{name}"][1])


def test_the_verbs_work_end_to_end(sparse: Path, tmp_path: Path) -> None:
    here = {name: str(tmp_path / name) for name in ("large", "small", "half", "both")}
    assert main(["grow", str(sparse), here["large"], "--factor", "2"]) == 0
    assert main(["shrink", here["large"], here["small"], "--experts", "3"]) == 0
    assert main(["export", here["small"], here["half"], "--dtype", "bfloat16"]) == 0
    first, second = dense_t5(tmp_path / "a"), dense_t5(tmp_path / "b")
    assert main(["merge", str(first), str(second), "--out", here["both"]]) == 0
    assert moezoo.load(here["both"]).config.num_experts == 2
    assert next(moezoo.load(here["half"]).parameters()).dtype == torch.bfloat16
