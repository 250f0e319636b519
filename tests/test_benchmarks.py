"""The pages of benchmarks/ belong to the samples beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import APART, NAMES
from benchmarks.summary import goals, with_goals

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_the_table_of_goals_is_that_of_the_samples() -> None:
    text = (FOLDER / "README.md").read_text()
    assert with_goals(text, goals(FOLDER)) == text


def test_every_page_that_the_overview_names_is_there() -> None:
    text = (FOLDER / "README.md").read_text()
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    assert {f"{name}.md" for name in NAMES} <= set(linked)
    assert all((FOLDER / name).is_file() for name in linked)


@pytest.mark.parametrize("name", (*NAMES, *APART))
def test_every_benchmark_can_be_started_as_it_says(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    assert f"python -m benchmarks.{name}" in source.partition('"""\n\n')[0]
    assert '__name__ == "__main__"' in source


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_samples_say_the_machine_and_the_day(file: Path) -> None:
    assert re.search(r"core.*\d{4}-\d{2}-\d{2}", json.loads(file.read_text())["machine"])
