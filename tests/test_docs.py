"""The documentation is true: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import json
import pydoc_data.topics
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moezoo.cli import available, main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text()) if found == language]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if blocks(page, "sh")]


def test_the_first_block_of_the_readme_is_python() -> None:
    language, _ = BLOCK.findall((ROOT / "README.md").read_text())[0]
    assert language == "python"


def test_the_first_screen_of_the_readme_shows_what_it_is_for() -> None:
    screen = " ".join((ROOT / "README.md").read_text().splitlines()[:30])
    for word in ("moezoo upcycle llama moe --experts 8", 'experts_implementation="moezoo"',
                 "moezoo report mixtral --text notes.txt"):  # fmt: skip
        assert word in screen


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_on_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page, "python")))
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    by_torchrun = page.parent == ROOT / "docs" / "parallel"
    done = subprocess.run(
        [sys.executable, *(ranks if by_torchrun else []), str(program)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_commands_on_a_page_name_verbs_and_targets_that_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["moezoo"] and not words[1].startswith("-"):
            assert words[1] in available(), line
        if words[:1] == ["make"]:
            assert words[1] in targets, line


def test_commands_of_the_training_page_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on the page, with fewer steps; toml blocks are the files that their first line names."""
    page = ROOT / "docs" / "training.md"
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "toml"):
        Path(block.partition("\n")[0].removeprefix("# ")).write_text(block)
    topics: dict[str, str] = pydoc_data.topics.topics
    Path("text.txt").write_text("\n\n".join(topics[n] for n in sorted(topics)[:20]))
    pairs = [{"source": f"number {i % 7}", "target": f"value {i % 7}"} for i in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    commands = [
        re.sub(r"--steps \d+", "--steps 3", line)
        for line in "\n".join(blocks(page, "sh")).splitlines()
        if line.startswith("moezoo")
    ]
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0, command
    assert "exact_match" in capsys.readouterr().out
    made = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert made >= {"run", "switch", "more", "tuned", "student"}


def test_commands_of_the_first_hour_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    topics: dict[str, str] = pydoc_data.topics.topics
    Path("text.txt").write_text("\n\n".join(topics[n] for n in sorted(topics)[:12]))
    pairs = [{"en": f"{n} houses", "de": f"{n} Haus"} for n in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for line in "\n".join(blocks(ROOT / "docs" / "first-hour.md", "sh")).splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    said = capsys.readouterr()
    assert "bleu  " in said.out or "bleu will not be measured" in said.err
    assert Path("routing.html").stat().st_size > 1000
    assert {p.name for p in Path("tuned/model").iterdir()} >= {"config.json", "spiece.model"}


def test_every_example_is_in_the_readme_and_every_component_on_the_site() -> None:
    readme = (ROOT / "README.md").read_text()
    for example in (ROOT / "examples").glob("[0-9]*.py"):
        assert f"(examples/{example.name})" in readme
    index = (ROOT / "docs" / "index.md").read_text()
    for folder in {page.parent.name for page in (ROOT / "docs").glob("*/*.md")}:
        assert f"\n{folder}/*\n" in index, folder


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    for pair in LINK.findall(re.sub(BLOCK, "", page.read_text())):
        target = (pair[0] or pair[1]).partition("#")[0]
        if target and not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target
