"""Where a verb reads and writes: a run's model is found, and a bad place is refused before work."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import moezoo
from moezoo.adapters.writer import check_place
from moezoo.cli import generate, main
from moezoo.errors import SaveError, TargetExists


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that has ended, with a model and a tokenizer of bytes."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = moezoo.SwitchConfig(
        vocab_size=384, d_model=16, d_kv=4, d_ff=16, num_heads=2, num_layers=2
    )
    moezoo.save(moezoo.build(config, seed=0), folder / "model")
    (folder / "metrics.jsonl").touch()
    return folder


def test_a_run_stands_for_its_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "2", "--tokenizer", "bytes"]
    assert main(["generate", *options, str(run), "one"]) == 0
    found = capsys.readouterr().out
    assert main(["generate", str(run / "model"), "one", *options]) == 0
    assert capsys.readouterr().out == found
    assert main(["info", str(run)]) == 0
    assert main(["merge", str(run), str(run), "--out", str(run.parent / "both")]) == 0


@pytest.mark.parametrize("columns", [72, 80, 120])
def test_a_plan_fits_the_terminal_and_is_whole_in_a_pipe(
    run: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(run), "--experts", "8"]
    assert main(words) == 0
    whole = capsys.readouterr().out
    assert "encoder.block.*.layer.0.SelfAttention.relative_attention_bias " in whole
    assert "  -> decoder.block.*.layer.2.mlp.experts.expert_*.wo, copy, times 8" in whole
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) >= len(whole.splitlines())


def test_a_run_that_has_not_ended_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert main(["info", str(tmp_path)]) == 3
    assert "has not ended: go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(("place", "reason"), [("file", "in the way"), ("new", "no such dir")])
def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_read(
    place: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["report", "--out", str(tmp_path / place / "page.html"), str(tmp_path / "no model")]
    assert main(words) == 4
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc here")
def test_a_target_in_proc_is_called_what_it_is() -> None:
    config = moezoo.SwitchConfig(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_heads=2, num_layers=1)
    for refused in (
        lambda: moezoo.save(moezoo.build(config), "/proc/moezoo-model"),
        lambda: check_place("/proc/moezoo-page"),
    ):
        with pytest.raises(SaveError, match="the system's own|nothing can be written") as found:
            refused()
        assert "disk is" not in str(found.value)


def test_a_target_that_exists_names_the_flag_and_the_argument(tmp_path: Path, run: Path) -> None:
    model = moezoo.load(run / "model")
    with pytest.raises(TargetExists, match="--overwrite, in Python overwrite=True"):
        moezoo.save(model, run / "model")


def test_a_conversation_ends_at_the_end_of_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo"))
    assert list(generate._conversation()) == ["one", "", "two"]
    said = capsys.readouterr()
    assert (said.out, said.err.count("> ")) == ("", 4)  # what is piped on holds no prompt
