"""The tables of docs/reproductions.md say what was measured, seed by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moezoo
from benchmarks.reproductions import RESULTS, SIZES, TABLES, Trial, key_of, read, widen
from benchmarks.reproductions_tables import (
    SECTIONS,
    at_equal_seconds,
    differences,
    filled,
    loss_at,
    parameters,
    spread,
    trials_of,
)

PAGE = Path(__file__).parent.parent / "docs" / "reproductions.md"


def row(before: float, *points: tuple[int, float, float]) -> dict[str, Any]:
    return {"before": before, "after": points[-1][2], "curve": points}


def test_the_page_holds_the_tables_of_the_recorded_trials() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, read(RESULTS)) == page


def test_every_table_has_a_section_and_a_picture() -> None:
    assert set(TABLES) == set(SECTIONS)
    for name, section in SECTIONS.items():
        assert section.reference in TABLES[name]
        assert (PAGE.parent / "images" / f"reproductions-{name}.png").is_file()


def test_a_seed_that_was_not_run_is_named() -> None:
    first, second, *_ = TABLES["balance"].items()
    rows = [{"key": key_of(first[1], seed, 0, 2)} for seed in (0, 1)]
    rows.append({"key": key_of(second[1], 0, 0, 2)})
    with pytest.raises(ValueError, match=rf"balance, '{second[0]}': no result for seeds \[1\]"):
        trials_of("balance", rows)


def test_a_page_without_a_table_is_refused() -> None:
    page = PAGE.read_text(encoding="utf-8").replace("<!-- /capacity -->", "")
    with pytest.raises(ValueError, match="capacity"):
        filled(page, read(RESULTS))


def test_a_trial_from_random_weights_does_not_depend_on_the_dense_steps() -> None:
    scratch, upcycled = Trial(scratch={}), Trial(upcycle={"num_experts": 2})
    assert key_of(scratch, 0, 10, 5) == key_of(scratch, 0, 20, 5)
    assert key_of(upcycled, 0, 10, 5) != key_of(upcycled, 0, 20, 5)
    assert json.loads(key_of(upcycled, 3, 10, 5))["seed"] == 3


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b"')
    assert read(path) == [{"key": "a"}]
    assert read(tmp_path / "none.jsonl") == []


def test_loss_between_two_measurements_is_on_the_line_between_them() -> None:
    measured = row(4.0, (10, 2.0, 3.0), (20, 6.0, 2.0))
    for seconds, loss in ((0.0, 4.0), (1.0, 3.5), (2.0, 3.0), (3.0, 2.75), (6.0, 2.0), (9.0, 2.0)):
        assert loss_at(measured, seconds) == pytest.approx(loss)


def test_models_are_compared_seed_by_seed_and_after_the_seconds_of_the_shorter_run() -> None:
    fast = [row(4.0, (10, 1.0, 3.0)), row(5.0, (10, 1.0, 4.0))]
    slow = [row(4.0, (10, 2.0, 2.9)), row(5.0, (10, 4.0, 3.5))]
    assert differences(slow, fast) == pytest.approx([-0.1, -0.5])
    assert at_equal_seconds(slow, fast) == pytest.approx([3.45 - 3.0, 4.625 - 4.0])
    assert at_equal_seconds(fast, slow) == pytest.approx([3.0 - 3.45, 4.0 - 4.625])


def test_a_spread_is_the_mean_and_both_ends() -> None:
    assert spread([1.0, 2.0, 6.0]) == "3.000 (1.000 to 6.000)"
    assert spread([-0.5, 1.0], digits=2, sign=True) == "+0.25 (-0.50 to +1.00)"


@pytest.mark.parametrize(
    ("trial", "experts", "choices"),
    [
        (Trial(), 1, 1),
        (Trial(scratch={"num_experts": 4}), 4, 1),
        (Trial(upcycle={"num_experts": 8, "router": {"name": "top_k", "k": 2}}), 8, 2),
    ],
)
def test_active_parameters_are_those_of_the_chosen_experts(
    trial: Trial, experts: int, choices: int
) -> None:
    dense, mlp = 295_936, 2 * 64 * 256
    routers = 2 * 64 * experts * (experts > 1)
    total, active = parameters(trial)
    assert total == dense + routers + 2 * (experts - 1) * mlp
    assert active == dense + routers + 2 * (choices - 1) * mlp


def test_widening_scales_matrices_of_attention_and_experts_and_nothing_else() -> None:
    config = moezoo.SwitchConfig(**SIZES, num_experts=4)
    model, same = moezoo.build(config, seed=0), moezoo.build(config, seed=0)
    widen(model, 4.0)
    factors = {
        name: float((parameter.norm() / other.norm()).detach())
        for (name, parameter), other in zip(
            model.named_parameters(), same.parameters(), strict=True
        )
    }
    scaled = {name for name, factor in factors.items() if factor == pytest.approx(2.0)}
    kept = {name for name, factor in factors.items() if factor == 1.0}
    assert scaled | kept == set(factors)
    ends = (".q.weight", ".k.weight", ".v.weight", ".o.weight", "experts.wi", "experts.wo")
    mlps = (".mlp.wi.weight", ".mlp.wo.weight")
    assert scaled == {name for name in factors if name.endswith((*ends, *mlps))}
