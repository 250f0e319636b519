"""The demo runs end to end on a little text, and says what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo import cli
from moezoo.demonstration.effort import LEAST, USUAL, Pace, effort
from moezoo.reporting.trial import Trial, balance, verdict

SUBJECTS = "router expert token layer model tensor gate batch".split()
VERBS = "sends weighs drops keeps trains holds".split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [
        f"The {a} {v} the {b}, and {i} {c}s follow the {a} of paragraph {i}."
        for i, (a, v, b, c) in enumerate(
            (a, v, b, c) for a in SUBJECTS for v in VERBS for b in SUBJECTS for c in SUBJECTS[:3]
        )
    ]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join("\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8)))
    return file


SMALL = (
    "--facts 64 --steps 6 --seeds 2 --text-steps 6 --further 4 --experts 4 --batch-size 4 "
    "--vocabulary 260"
).split()


def test_the_demo_goes_from_facts_and_text_to_a_picture(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--text", str(text), *SMALL]) == 0
    said = capsys.readouterr().out
    assert "steps to dense's end" in said
    assert "times the parameters, all of them in memory" in said
    assert "The least even layer is " in said
    assert "held-out loss after, nats" in said
    assert "    verified: " in said
    results = json.loads((out / "results.json").read_text())
    book = results["closed_book"]
    assert (
        [one["seed"] for one in book["dense"]] == [one["seed"] for one in book["switch"]] == [0, 1]
    )
    for dense, switch in zip(book["dense"], book["switch"], strict=True):
        assert dense["curve"][0]["recall"] == switch["curve"][0]["recall"]
    assert abs(results["dense"]["before"] - results["switch"]["before"]) <= 1e-4
    assert results["dense"]["after"] < results["dense"]["before"]
    for shares in results["switch"]["loads"].values():
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1.0)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "demo.html").read_text()
    assert "moezoo upcycle" in page
    assert 'src="data:image/png' in page
    assert "http" not in page
    text_of_page = (out / "routing.html").read_text()
    mark = '<script type="application/json" id="moezoo-report">'
    routing = json.loads(text_of_page.partition(mark)[2].partition("</script>")[0])
    assert routing["run"]["steps"] == 4 and len(routing["layers"]) == 2
    assert routing["pair"]["dense"] and routing["pair"]["layers"][0]["siblings"]
    again = tmp_path / "again.html"  # the run directory is one that the verb takes
    words = ["report", str(out / "run/model"), "--run", str(out / "run"), "--text", str(text)]
    words += ["--against", str(out / "dense"), "--batches", "1", "--length", "32"]
    assert cli.main([*words, "--out", str(again)]) == 0
    assert again.read_text().count("</script>") == 2
    # A folder that a demo made takes another one.
    assert cli.main(["demo", "--out", str(out), "--text", str(text), *SMALL]) == 0


def test_the_demo_leaves_folders_of_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "switch" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_text("years of work")
    assert cli.main(["demo", "--out", str(tmp_path), *SMALL]) == 4
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["switch"]
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize("option", ["--steps", "--threads", "--text-steps", "--facts"])
def test_the_demo_refuses_nonsense(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--out", str(tmp_path), option, "0"]) == 2
    assert f"{option} is at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dense", "switch", "winner"), [(4.2, 4.1, "switch"), (4.1, 4.2, "dense"), (4.1, 4.1, "both")]
)
def test_whichever_model_is_lower_is_named(dense: float, switch: float, winner: str) -> None:
    sizes = {"before": 5.0, "steps": 9, "seconds": 2.0, "tokens": 10, "parameters": 3, "active": 3}
    said = verdict(Trial("dense", after=dense, **sizes), Trial("switch", after=switch, **sizes))
    assert f"{winner} is ahead" in said or f"{winner} models stand" in said


def test_the_least_even_layer_is_named() -> None:
    loads = {"encoder 1": [0.3, 0.3, 0.2, 0.2], "decoder 1": [0.97, 0.0, 0.02, 0.01]}
    said = balance(Trial("switch", 5.0, 4.0, 9, 2.0, 10, 3, 3, loads=loads))
    assert "decoder 1: of 4 experts the busiest takes 97%" in said and "and 3 take less" in said
    assert not balance(Trial("dense", 5.0, 4.0, 9, 2.0, 10, 3, 3))


def test_the_demo_takes_fewer_steps_where_time_is_short() -> None:
    nothing = dict.fromkeys(USUAL)
    fast, slow = Pace(0.02, 0.03), Pace(0.08, 0.1)
    assert effort(nothing, fast, 200).share == 1.0
    assert effort(nothing, fast, 200).seeds(fast, 200, most=3) == 3
    fewer = effort(nothing, slow, 200)
    assert LEAST < fewer.share < 1 and fewer.steps == round(fewer.share * USUAL["steps"])
    assert fewer.seed(slow) + fewer.rest(slow) == pytest.approx(200, rel=0.02)
    assert fewer.seeds(slow, 200, most=3) == 1
    assert effort(nothing, Pace(9.0, 9.0), 200).share == LEAST
    asked = effort({**nothing, "steps": 600}, slow, 200)
    assert asked.steps == 600 and asked.text_steps < USUAL["text_steps"]
