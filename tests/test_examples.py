"""Every example runs as a program, says something, and fits on a page."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def started_as(example: Path) -> list[str]:
    """What stands before an example's name where it says how it is run."""
    return TORCHRUN if "Run: torchrun --nproc-per-node 2 " in example.read_text() else []


def test_one_example_is_for_torchrun() -> None:
    assert [path.stem for path in EXAMPLES if started_as(path)] == ["08_more_than_one_device"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", *started_as(example), str(example)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    left = [path for path in tmp_path.iterdir() if path.name != ".hypothesis"]
    assert not left, "an example leaves no files behind"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_stays_under_eighty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 80


def test_the_page_of_a_trained_llama_stays_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "07_upcycle_llama.py"))
    example["main"](example["small_llama"](tmp_path), tmp_path / "made")
    page = tmp_path / "made" / "report.html"
    assert f"page: {page}" in capsys.readouterr().out
    held = page.read_text().partition('id="moezoo-report">')[2].partition("</script>")[0]
    layers = json.loads(held)["layers"]
    assert [layer["experts"] for layer in layers] == [8, 8]
    assert [sum(layer["load"]) for layer in layers] == [64 * 24 * 2] * 2  # two experts a token
    assert (tmp_path / "made" / "trained" / "config.json").is_file()
