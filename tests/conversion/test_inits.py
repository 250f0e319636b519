"""Every registered initialisation keeps the property that defines it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.adapters.upcycle.calibration import Calibration, collected_inputs
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.inits import expert_inits, router_inits
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.cli import main
from moezoo.errors import ConfigError
from tests.conversion.dense import dense_t5, ids, relative

KEY = "encoder.blocks.1.mlp"


def matrices(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "wi": torch.randn(24, 16, generator=generator),
        "wo": torch.randn(16, 24, generator=generator),
    }


def made(init: object, index: int, count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return expert_inits.build(init).expert([matrices()], index, count, key=KEY, seed=seed)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    "init",
    [
        "copy",
        "branches",
        {"name": "noise", "scale": 0.0},
        {"name": "drop", "rate": 0.0},
        {"name": "lora", "scale": 0.0},
    ],
)
def test_initialisations_without_their_effect_are_copies(init: object) -> None:
    assert all(same(made(init, index), matrices()) for index in range(4))


@pytest.mark.parametrize("name", expert_inits.names())
def test_random_numbers_depend_on_seed_and_expert_alone(name: str) -> None:
    assert same(made(name, 2), made(name, 2))
    random = name in ("noise", "drop", "lora")
    assert same(made(name, 2), made(name, 2, seed=1)) != random
    assert random != same(made(name, 1), made(name, 1, seed=9))


def test_noise_is_relative_to_the_matrix() -> None:
    noisy = made({"name": "noise", "scale": 0.1}, 0)
    for name, matrix in matrices().items():
        assert 0.08 < float((noisy[name] - matrix).std() / matrix.std()) < 0.12


def test_drop_redraws_one_set_of_units_in_all_matrices() -> None:
    dropped = made({"name": "drop", "rate": 0.25}, 0)
    rows = (dropped["wi"] != matrices()["wi"]).any(dim=1)
    columns = (dropped["wo"] != matrices()["wo"]).any(dim=0)
    assert torch.equal(rows, columns) and int(rows.sum()) == 6


def test_lora_differs_by_the_rank_it_names() -> None:
    changed = made({"name": "lora", "rank": 3}, 0)
    for name, matrix in matrices().items():
        difference = (changed[name] - matrix).double()
        values = torch.linalg.svdvals(difference)
        assert int((values > 1e-4 * values[0]).sum()) == 3


def test_all_slices_of_a_split_add_up_to_the_dense_layer() -> None:
    x, dense = torch.randn(5, 16), matrices()
    whole = (x @ dense["wi"].T).relu() @ dense["wo"].T
    parts = [made("split", index) for index in range(4)]
    total = sum((x @ part["wi"].T).relu() @ part["wo"].T for part in parts)
    assert torch.allclose(total, whole, atol=1e-4)


def test_virtual_groups_hold_every_slice_once_per_copy() -> None:
    init = expert_inits.build({"name": "virtual_group", "shards": 2})
    rows = init.router_rows(6)
    for copy in range(3):
        members = [expert for expert in range(6) if rows[expert] == copy]
        joined = torch.cat([made({"name": "virtual_group"}, e, 6)["wi"] for e in members])
        assert torch.equal(joined, matrices()["wi"])


def test_branches_take_turns() -> None:
    init = expert_inits.build("branches")
    branches = [matrices(seed) for seed in range(3)]
    for index in range(6):
        expert = init.expert(branches, index, 6, key=KEY, seed=0)
        assert same(expert, branches[index % 3])


@pytest.mark.parametrize("init", ["copy", "split", "virtual_group:2", "virtual_group:4", "noise:0"])
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_exact_initialisations_keep_the_function_of_the_model(
    init: str, family: str, tmp_path: Path
) -> None:
    source = dense_t5(tmp_path / "dense", family)
    convert(source, tmp_path / "out", Recipe(4, init=init))
    with torch.no_grad():
        dense = moezoo.load(source)(ids(), decoder_input_ids=ids()).logits
        sparse = moezoo.load(tmp_path / "out", capacity="dropless")
        assert relative(sparse(ids(), decoder_input_ids=ids()).logits, dense) <= 1e-5


def test_a_streamed_and_a_live_upcycling_are_the_same_model(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    inits = ("copy", "split", {"name": "virtual_group", "shards": 2})
    for init in (*inits, {"name": "noise", "scale": 0.1}, {"name": "drop", "rate": 0.5}):
        convert(source, tmp_path / "out", Recipe(4, init=init, seed=3), overwrite=True)
        live = moezoo.upcycle(moezoo.load(source), num_experts=4, init=init, seed=3).state_dict()
        streamed = moezoo.load(tmp_path / "out").state_dict()
        assert set(live) == set(streamed)
        assert all(torch.equal(live[name], streamed[name]) for name in live)


def rows(
    name: object, inputs: Tensor | None = None, seed: int = 0, experts: Tensor | None = None
) -> Tensor:
    init = router_inits.build(name)
    values = init.rows(4, 16, key=KEY, seed=seed, inputs=inputs, experts=experts)
    return torch.tensor(values).view(4, 16)


def test_a_normal_router_has_its_deviation() -> None:
    values = router_inits.build({"name": "normal", "std": 0.5}).rows(64, 64, key=KEY, seed=0)
    assert 0.48 < float(torch.tensor(values).std()) < 0.52
    assert torch.equal(rows("normal"), rows("normal"))
    assert not torch.equal(rows("normal"), rows("normal", seed=1))


def test_a_zero_router_is_zero() -> None:
    assert int(rows("zero").count_nonzero()) == 0


def test_mean_orthogonal_rows_do_not_see_the_mean() -> None:
    inputs = torch.randn(200, 16) + 3.0
    spec = {"name": "mean_orthogonal", "std": 1.0}
    seen = rows(spec, inputs) @ inputs.mean(dim=0)
    assert (
        float(seen.abs().max()) < 1e-4 < float((rows("normal") @ inputs.mean(0)).abs().max()) * 1e3
    )


def test_mean_orthogonal_spreads_tokens_with_a_common_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 16, generator=generator) + 3.0
    counts = torch.bincount(
        (inputs @ rows({"name": "mean_orthogonal", "std": 1.0}, inputs).T).argmax(1), minlength=4
    )
    plain = torch.bincount(
        (inputs @ rows({"name": "normal", "std": 1.0}).T).argmax(1), minlength=4
    )  # fmt: skip
    assert int(counts.max()) < 1600 < 3200 < int(plain.max())


def test_centroids_point_at_the_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(16)[:4] * 10
    member = torch.arange(400) % 4
    inputs = centres[member] + 0.1 * torch.randn(400, 16, generator=generator)
    chosen = (inputs @ rows({"name": "centroids", "std": 1.0}, inputs).T).argmax(dim=1)
    groups = {tuple(chosen[member == m].unique().tolist()) for m in range(4)}
    assert len(groups) == 4 and all(len(group) == 1 for group in groups)


def test_prompts_send_text_like_theirs_to_their_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator) + 3.0
    member = torch.arange(400) % 4
    inputs = centres[member] + 0.1 * torch.randn(400, 16, generator=generator)
    made = rows({"name": "prompts", "std": 1.0}, inputs[:200], experts=member[:200])
    assert torch.equal((inputs[200:] @ made.T - (made @ inputs.mean(0))).argmax(1), member[200:])
    assert torch.allclose(made.norm(dim=1), torch.tensor(4.0))
    assert torch.allclose((made / 4).T, rows({"name": "prompts", "std": 0.25}, inputs[:200],
                                             experts=member[:200]).T)  # fmt: skip


@pytest.mark.parametrize("experts", [None, [0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 4]])
def test_prompts_of_too_few_or_too_many_experts_are_refused(experts: list[int] | None) -> None:
    labels = None if experts is None else torch.tensor(experts)
    with pytest.raises(ConfigError, match="prompts are needed for every expert"):
        rows("prompts", torch.randn(6, 16), experts=labels)


def sample_file(tmp_path: Path, name: str, content: object) -> str:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_prompts_work_from_the_command_line(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    text = [["01234", "#$%"], ["&&&", [5, 6, 7]]]  # bytes below 58: the vocabulary has 61 ids
    ids_alone = [[[ord(c) + 3 for c in p] + [1] if isinstance(p, str) else p for p in g]
                 for g in text]  # fmt: skip
    recipe = ["--experts", "2", "--router-init", "prompts"]
    for name, content in (("text", text), ("ids", ids_alone)):
        file = sample_file(tmp_path, f"{name}.json", content)
        out = [str(source), str(tmp_path / name), "--calibration", file, "--verify"]
        assert main(["upcycle", *out, *recipe]) == 0
    for file in (tmp_path / "text").iterdir():
        assert file.read_bytes() == (tmp_path / "ids" / file.name).read_bytes()
    made = json.loads((tmp_path / "text/config.json").read_text())["moezoo_provenance"]
    assert len(made["calibration_sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[[", "cannot be read.*one list per expert"),
        ("a.json", [], "cannot be read"),
        ("a.json", {"0": ["text"]}, "cannot be read"),
        ("a.json", [["text", 5]], "cannot be read"),
        ("a.json", [[[1, -2]]], "cannot be read"),
        ("a.json", [[True]], "cannot be read"),
        ("a.json", [["text"], ["text"]], "tokenizer beside the source.*token ids in a JSON"),
        ("a.txt", "some text", "tokenizer beside the source"),
        ("a.json", [[[5]], [[6]], [[7]]], "prompts for experts 0 to 1"),
    ],
)
def test_bad_calibrations_are_refused_and_leave_nothing(
    name: str, content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_t5(tmp_path / "dense")
    (source / "spiece.model").unlink()
    file = sample_file(tmp_path, name, content)
    words = ["--experts", "2", "--router-init", "prompts", "--calibration", file]
    assert main(["upcycle", str(source), str(tmp_path / "out"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_live_and_streamed_prompts_are_the_same_router(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    sample = Calibration([[5, 9, 12, 1], [7, 20, 41, 1]], experts=[1, 0])
    recipe = {"num_experts": 2, "router_init": "prompts"}
    convert(source, tmp_path / "out", Recipe(**recipe), calibration=sample)
    live = moezoo.upcycle(moezoo.load(source), calibration=sample, **recipe).state_dict()
    streamed = moezoo.load(tmp_path / "out").state_dict()
    assert all(torch.equal(live[name], streamed[name]) for name in live)


@pytest.mark.parametrize("router_init", ["mean_orthogonal", "centroids"])
def test_fitted_routers_work_end_to_end(router_init: str, tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    sample = Calibration([[5, 9, 12, 30, 1], [7, 7, 20, 41, 1]])
    convert(source, tmp_path / "out", Recipe(4, router_init=router_init), calibration=sample)
    with torch.no_grad():
        dense = moezoo.load(source)(ids(), decoder_input_ids=ids()).logits
        sparse = moezoo.load(tmp_path / "out", capacity="dropless")
        assert relative(sparse(ids(), decoder_input_ids=ids()).logits, dense) <= 1e-5


def test_sample_text_is_read_in_evaluation_and_every_module_keeps_its_mode() -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 2}
    model = moezoo.build(moezoo.SwitchConfig(**sizes, num_layers=2, dropout_rate=0.5), seed=0)
    sample = Calibration([[5, 9, 12, 30, 1], [7, 7, 20, 41, 1]])
    layers = ["encoder.blocks.1.mlp", "decoder.blocks.1.mlp"]
    wanted = collected_inputs(model.eval(), sample, layers)
    frozen = model.train().encoder.eval()
    found = collected_inputs(model, sample, layers)
    assert all(torch.equal(found[name].inputs, wanted[name].inputs) for name in layers)
    assert model.training and model.decoder.blocks[0].training
    assert not any(module.training for module in frozen.modules())


def test_the_model_reads_the_sample_text_on_the_device_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_t5(tmp_path / "dense")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    words = ["--experts", "2", "--router-init", "centroids", "--device", "nowhere", "--calibration"]
    file = sample_file(tmp_path, "a.txt", "0123")
    assert main(["upcycle", str(source), str(tmp_path / "out"), *words, file]) == 2
    assert "nowhere" in capsys.readouterr().err
    merged = ["merge", str(source), str(source), "--out", str(tmp_path / "out"), *words[2:], file]
    assert main(merged) == 2
    assert "nowhere" in capsys.readouterr().err
