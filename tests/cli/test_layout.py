"""`moezoo layout` as a user reads it, of presets and of directories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import moezoo
from moezoo import cli
from moezoo.layouts import plan
from tests.models.tiny import TINY

WORDS = ["switch-c-2048", "--gpus", "1024", "--memory", "141GB"]


def test_the_page_fits_a_terminal_and_holds_what_was_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["layout", *WORDS]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    best, *others = plan("switch-c-2048", gpus=1024, memory="141GB")
    assert "best: ep 1024, dp 1, dense weights over 8 GPUs, 128 replicas" in said
    assert f"{best.expert_parameters:,} expert weights on each GPU" in said
    for part in ("memory", "activations", "wire", "rows", "step", "compute", "optimizer"):
        assert part in said
    assert others[0].reason in said and f"and {len(others) - 8} more: --json has all" in said


def test_what_does_not_fit_says_how_many_gpus_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layout", "switch-xxl-128", "--gpus", "8", "--memory", "80GB"]) == 0
    said = capsys.readouterr().out
    assert "nearest: ep 8" in said and "128 GPUs are the fewest that fit" in said
    assert max(map(len, said.splitlines())) <= 80


def test_json_has_every_layout_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["layout", *WORDS, "--optimizer", "adafactor", "--tokens", "4096", "--json"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    expected = plan("switch-c-2048", gpus=1024, memory="141GB", optimizer="adafactor", tokens=4096)
    assert facts["layouts"] == [layout.to_dict() for layout in expected]


@pytest.mark.parametrize("task", ["conditional_generation", "encoder"])
def test_a_directory_is_planned_as_its_config(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moezoo.save(moezoo.build(TINY, task=task, seed=0), tmp_path / "model")
    words = ["layout", str(tmp_path / "model"), "--gpus", "4", "--memory", "10GB", "--json"]
    assert cli.main([*words, "--node", "2", "--keep", "--length", "128"]) == 0
    (best, *_) = json.loads(capsys.readouterr().out)["layouts"]
    over = best["dense_over"]
    held = best["expert_parameters"] * (over if best["ep"] == 1 else 4)
    held += best["dense_parameters"] * over
    whole = sum(p.numel() for p in moezoo.load(tmp_path / "model").parameters())
    assert whole <= held <= 1.1 * whole  # rank 0 holds what is rounded up


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["swich-base-8", "--gpus", "8", "--memory", "80GB"], "Did you mean 'switch-base-8'", 2),
        (["switch-base-8", "--gpus", "12", "--memory", "80GB"], "Take 8 or 16", 2),
        (["switch-base-8", "--gpus", "8", "--memory", "much"], "bad memory", 2),
        (["switch-base-8", "--gpus", "8", "--memory", "80GB", "--node", "0"], "machine.node", 2),
    ],
)
def test_an_error_is_one_line(
    words: list[str], said: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["layout", *words]) == code
    out, complaint = capsys.readouterr()
    assert out == "" and said in complaint and complaint.count("\n") == 1


def test_it_imports_no_torch() -> None:
    code = f"import sys\nfrom moezoo.cli import main\nmain(['layout', *{WORDS!r}])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
