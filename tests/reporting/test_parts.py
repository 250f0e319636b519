"""Runs, two models, sizes, and the program of the page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import moezoo
from benchmarks.report import routed
from moezoo import traces
from moezoo.reporting import page_of_report
from moezoo.reporting.observation import Observation
from moezoo.reporting.report import report
from moezoo.reporting.run_metrics import POINTS, curves, run_document
from moezoo.reporting.two_models import stacks
from tests.reporting.known import observation

CONFIG = moezoo.SwitchConfig(
    vocab_size=90, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=0
)
IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS, "labels": IDS[:, :5]}]


def test_an_exact_upcycling_is_apart_by_nothing() -> None:
    dense = moezoo.build(CONFIG, seed=0)
    switch = moezoo.upcycle(dense, num_experts=4)
    pair = report(switch, BATCHES, against=dense, against_name="x").document["pair"]
    assert pair["dense"] and pair["error"] < 1e-5 and pair["largest"] < 1e-4
    for layer in pair["layers"]:
        assert layer["agreement"] is None
        assert max(layer["parent"]) < 1e-6 and layer["siblings"] == [0.0] * 4


@pytest.mark.parametrize("experts", ["stacked", "modules"])
def test_distances_are_those_of_a_plain_loop(experts: str) -> None:
    dense = moezoo.build(CONFIG, seed=0)
    switch = moezoo.build(CONFIG, seed=1, num_experts=4, experts=experts)
    layer = "encoder.blocks.1.mlp"
    (found,) = [
        part
        for part in report(switch, BATCHES, against=dense).document["pair"]["layers"]
        if part["layer"] == layer
    ]
    own, theirs = stacks(switch.get_submodule(layer)), dense.get_submodule(layer)
    assert sorted(own) == ["wi", "wo"]
    for e in range(4):
        parent, sibling = [], []
        for name, stack in own.items():
            mine = stack[e].double().flatten()
            p = theirs.get_submodule(name).weight.detach().double().flatten()
            p = p * (mine @ p) / (p @ p)
            parent.append(float((mine - p).square().sum() / mine.square().sum()))
            others = [stack[o].double().flatten() for o in range(4) if o != e]
            gaps = [float((mine - o).square().sum()) for o in others]
            sibling.append(sum(gaps) / 3 / float(mine.square().sum()))
        assert found["parent"][e] == pytest.approx(math.sqrt(sum(parent) / 2), rel=6e-3)
        assert found["siblings"][e] == pytest.approx(math.sqrt(sum(sibling) / 2), rel=6e-3)


def test_routing_agrees_with_itself_and_less_with_another() -> None:
    one, other = (
        moezoo.build(CONFIG, seed=seed, num_experts=4, experts="stacked") for seed in (0, 1)
    )
    same = report(one, BATCHES, against=one).document["pair"]
    assert same["error"] == 0 and {part["agreement"] for part in same["layers"]} == {1.0}
    assert all(max(part["parent"]) < 1e-7 for part in same["layers"])
    apart = report(one, BATCHES, against=other).document["pair"]
    assert apart["error"] > 0.1 and all(part["agreement"] < 1 for part in apart["layers"])


def test_a_run_is_averaged_into_points_that_say_their_steps() -> None:
    rows = [{"step": s, "loss": float(s), "dead_by_layer": {"0": 2}} for s in range(1, 1001)]
    found = curves([*rows, {"step": 500, "held_out": 1.5}], name="r")
    assert found["averaged"] == 5 and len(found["step"]) == 200 <= POINTS
    assert (found["step"][0], found["loss"][0], found["step"][-1]) == (5, 3.0, 1000)
    assert found["held_out"] == [[500, 1.5]] and found["dropped"] == [None] * 200
    assert found["dead_by_layer"] == {"0": [2.0] * 200}


def test_a_line_that_was_cut_is_left_out_and_one_of_something_else_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert run_document(tmp_path)["loss"] == run_document(file)["loss"] == [2.5]
    for bad in ("[]", "{}", '{"step": 1, "loss": "x"}', "nonsense"):
        file.write_text(f'{{"step": 1, "loss": 2.5}}\n{bad}\n')
        with pytest.raises(moezoo.MoezooError, match="line 2 is none of a run's"):
            run_document(tmp_path)


def test_a_training_run_says_which_layers_have_dead_experts(tmp_path: Path) -> None:
    from moezoo.training.recipes import recipe
    from moezoo.training.run import run_training

    model = moezoo.build(CONFIG, seed=0, num_experts=8)
    batch = {**BATCHES[0], "attention_mask": torch.ones_like(IDS)}
    run_training(model, lambda step: batch, recipe("small"), tmp_path, steps=3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(sum(row["dead_by_layer"].values()) == row["dead"] for row in rows if "loss" in row)
    assert run_document(tmp_path)["steps"] == 3


def test_a_large_report_is_under_a_megabyte() -> None:
    made = report(routed(2000, 24, 128, 1), tokenizer=lambda i: f"\u2581piece{i}")
    assert len(made.html().encode()) < 1_000_000


def test_reports_of_a_trace_are_equal_after_it_was_saved(tmp_path: Path) -> None:
    seen = observation()
    seen.trace.save(tmp_path / "trace.safetensors")
    again = Observation(traces.load(tmp_path / "trace.safetensors"), seen.ids)
    for one, other in zip(
        report(Observation(seen.trace, seen.ids)).document["layers"],
        report(again).document["layers"],
        strict=True,
    ):
        assert one == other


ASSETS = sorted((Path(page_of_report.__file__).parent / "assets").iterdir())
SCRIPTS = [path for path in ASSETS if path.suffix == ".js"]


def test_every_part_of_the_program_is_in_the_page_and_in_the_package() -> None:
    assert {path.stem for path in SCRIPTS} == set(page_of_report.PROGRAM)
    assert {path.name for path in ASSETS if path.suffix != ".js"} == {"page.html", "page.css"}
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"reporting/assets/*"' in settings


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_readable_and_never_make_markup(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= 350 and max(map(len, lines)) <= 112 and lines[0].startswith("//")
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "Function(", "var ",
                      "document.write", "</script", "<!--", "localStorage"):  # fmt: skip
        assert forbidden not in text, forbidden
    addresses = re.findall(r"https?://[^\"' ]*", text)
    assert addresses in ([], ["http://www.w3.org/2000/svg"])


def test_the_program_parses() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    program = page_of_report._program()
    subprocess.run([node, "--check", "-"], input=program, text=True, check=True)


# How the eyes of people without one kind of cone mix linear light (Machado, Oliveira and
# Fernandes 2009, severity 1).
EYES = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "without red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                    [-0.003882, -0.048116, 1.051998]],
    "without green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                      [-0.011820, 0.042940, 0.968881]],
    "without blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                     [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
          [0.0193339, 0.1191920, 0.9503041]]  # fmt: skip


@pytest.mark.parametrize("eyes", EYES)
def test_eight_colours_are_told_apart_by_all_common_eyes(eyes: str) -> None:
    style = next(path for path in ASSETS if path.suffix == ".css").read_text()
    palettes = re.findall(r"--e0: .*", style)
    assert len(palettes) == 3  # by day, by night, on paper
    for palette in palettes:
        colours = re.findall(r"#[0-9a-f]{6}", palette)
        assert len(set(colours)) == 8
        rgb = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours]
        seen = linear(torch.tensor(rgb, dtype=torch.float64)) @ torch.tensor(EYES[eyes]).double().T
        lab = lab_of(seen.clamp(0, 1))
        apart = torch.cdist(lab, lab) + 1e3 * torch.eye(8)
        assert float(apart.min()) > 20


def linear(rgb: torch.Tensor) -> torch.Tensor:
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab_of(light: torch.Tensor) -> torch.Tensor:
    """CIELAB under D65, where a distance of 2 can just be seen."""
    xyz = light @ torch.tensor(TO_XYZ).double().T / torch.tensor([0.95047, 1.0, 1.08883])
    f = torch.where(xyz > 216 / 24389, xyz ** (1 / 3), 841 / 108 * xyz + 4 / 29)
    return torch.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1
    )
