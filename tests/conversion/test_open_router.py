"""The router of a recipe that names none: what can be loaded elsewhere, or what learns most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import moezoo
from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.plan import make_plan
from moezoo.adapters.upcycle import upcycle
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.folding import FOLD
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.verify import verify
from moezoo.cli import main
from moezoo.demonstration.closed_book import SETTINGS, learn, small_t5
from moezoo.errors import ConfigError
from moezoo.training.facts import Facts
from tests.conversion.dense import dense_t5, ids, relative

UNIT = {"name": "switch", "weight": "unit"}
WIDE, SHARP = ({"name": "normal", "std": std} for std in (0.02, 0.5))


@pytest.mark.parametrize(
    ("family", "given", "router", "rows"),
    [
        ("t5", {}, "switch", "normal"),
        ("t5", {"layout": "moezoo"}, UNIT, WIDE),
        ("t5", {"dtype": "float16"}, UNIT, WIDE),  # which transformers' layout cannot hold
        ("t5_v1_1", {}, UNIT, WIDE),
        ("umt5", {}, UNIT, WIDE),
        ("umt5", {"router": "switch"}, "switch", "normal"),
        ("t5", {"router": {"name": "top_k", "k": 2}}, {"name": "top_k", "k": 2}, WIDE),
        ("t5", {"router": {"name": "top_k", "k": 1}}, {"name": "top_k", "k": 1}, "normal"),
        ("t5", {"init": "virtual_group:2"}, "switch", SHARP),
        ("t5", {"init": "split"}, "switch", "normal"),
        ("t5_v1_1", {"router_init": "zero"}, UNIT, "zero"),
    ],
)
def test_an_open_router_is_decided_by_what_can_hold_it_and_stays_exact(
    tmp_path: Path, family: str, given: dict[str, Any], router: Any, rows: Any
) -> None:
    dense = dense_t5(tmp_path / "dense", family)
    layout = given.pop("layout", "auto")
    with open_checkpoint(dense) as checkpoint:
        plan = make_plan(checkpoint, Recipe(num_experts=4, **given), layout=layout)
    assert (plan.recipe.router, plan.recipe.router_init) == (router, rows)
    upcycle(dense, num_experts=4, **given, layout=layout, out=tmp_path / "sparse")
    made = json.loads((tmp_path / "sparse/config.json").read_text())["moezoo_provenance"]
    assert (made["recipe"]["router"], made["recipe"].get("router_init")) == (router, rows)
    assert verify(tmp_path / "sparse", dense, levels=range(1, 5 + 1)).passed
    if "dtype" not in given:
        batch = {"input_ids": ids(), "labels": ids(seed=1)}
        with torch.no_grad():
            found = moezoo.load(tmp_path / "sparse")(**batch).logits
            assert relative(found, moezoo.load(dense)(**batch).logits) < 2e-5


def test_one_layer_is_sparse_where_there_is_no_second(tmp_path: Path) -> None:
    dense = dense_t5(tmp_path / "dense", num_layers=1)
    with open_checkpoint(dense) as checkpoint:
        config = make_plan(checkpoint, Recipe(num_experts=4)).config
    assert (config.encoder_sparse, config.decoder_sparse) == ((0,), (0,))


def test_what_was_made_before_is_verified_by_what_it_meant(tmp_path: Path) -> None:
    dense = dense_t5(tmp_path / "dense", "t5_v1_1")
    plain = {"router": "switch", "router_init": "normal"}
    upcycle(dense, num_experts=4, **plain, out=tmp_path / "sparse")  # type: ignore[arg-type]
    config = tmp_path / "sparse/config.json"
    values = json.loads(config.read_text())
    for name in plain:
        del values["moezoo_provenance"]["recipe"][name]
    config.write_text(json.dumps(values))
    assert verify(tmp_path / "sparse", dense, levels=range(1, 3 + 1)).passed


def test_plan_and_upcycle_say_which_router_was_taken_and_how_to_have_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relu, gated = dense_t5(tmp_path / "relu"), dense_t5(tmp_path / "gated", "t5_v1_1")
    for dense, flag in ((relu, "--layout moezoo"), (gated, "--router switch")):
        for verb in (["plan", str(dense)], ["upcycle", str(dense), str(tmp_path / "out")]):
            assert main([*verb, "--experts", "4"]) == 0
            assert flag in " ".join(capsys.readouterr().out.split())
        (tmp_path / "out").rename(tmp_path / f"{dense.name}-out")


def _trained(model: nn.Module) -> None:
    """Experts and routers apart from each other, as training leaves them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.3 * parameter.std() * noise + 0.05 * noise


def test_a_folded_model_of_unit_weight_is_one_of_transformers(tmp_path: Path) -> None:
    dense = dense_t5(tmp_path / "dense")
    upcycle(dense, num_experts=4, layout="moezoo", out=tmp_path / "sparse")
    model = moezoo.load(tmp_path / "sparse")
    _trained(model)
    moezoo.save(model, tmp_path / "trained")
    assert main(["export", str(tmp_path / "trained"), str(tmp_path / "hf"), "--fold"]) == 0
    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "hf"
    ).eval()
    batch = {"input_ids": ids(), "labels": ids(seed=1)}
    with torch.no_grad():
        expected = model(**batch)
        found = theirs(**batch, output_router_logits=False).logits
    routed = moezoo.load(tmp_path / "hf")
    with torch.no_grad():
        again = routed(**batch)
    for before, after in zip(expected.routing, again.routing, strict=True):
        assert torch.equal(before.assignment.expert, after.assignment.expert)
    assert relative(found, expected.logits) < 20 * FOLD
    assert routed.config.wo_scale == 4.0


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    upcycle(dense_t5(tmp_path / "dense"), num_experts=4, out=tmp_path / "sparse")
    with pytest.raises(ConfigError, match="unit weight"):
        export(tmp_path / "sparse", tmp_path / "out", fold=True)
    with pytest.raises(ConfigError, match="no router to fold"):
        export(tmp_path / "sparse", tmp_path / "out", fold=True, expert=0)
    assert not (tmp_path / "out").exists()


def test_on_facts_tokens_keep_their_expert_while_the_router_is_slow() -> None:
    facts = Facts(1024, batch_size=256)
    parent = moezoo.build(small_t5(), seed=0)
    learn(parent, facts, "parent", steps=150)
    kept = {}
    for name, recipe, rate in (
        ("unit", {"router": UNIT, "router_init": WIDE}, 0.01),
        ("probability", {"router": "switch", "router_init": "normal"}, 1.0),
    ):
        model = moezoo.upcycle(parent, num_experts=8, layers="all", **recipe)  # type: ignore[arg-type]
        before = _choices(model, facts)
        settings = SETTINGS.with_changes(learning_rate=2e-3, router_learning_rate=rate)
        learn(model, facts, name, steps=50, skip=150, settings=settings)
        kept[name] = float((before == _choices(model, facts)).float().mean())
    assert kept["unit"] >= 0.9
    assert kept["probability"] < 0.6


@torch.no_grad()
def _choices(model: nn.Module, facts: Facts) -> torch.Tensor:
    routings = model.eval()(**facts(0)).routing
    return torch.cat([routing.assignment.expert for routing in routings])
