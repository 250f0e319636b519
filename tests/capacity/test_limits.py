"""Limit rules against the formulas of the libraries that they are named for."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from moezoo.capacity.limits import RULES, Limit
from moezoo.errors import ConfigError
from tests.capacity.routings import policy, routing

CASES = [
    (f, s, k, e)
    for f in (0.5, 1.0, 1.1, 1.25, 2.0)
    for s in (1, 10, 96, 512)
    for k in (1, 2)
    for e in (1, 3, 8, 64)
]


@pytest.mark.parametrize(("f", "s", "k", "e"), CASES)
def test_every_rule_equals_its_librarys_formula(f: float, s: int, k: int, e: int) -> None:
    exact = Fraction(str(f)) * s  # no binary rounding
    vmoe = math.ceil(exact * k / e)
    assert RULES["switch"](f, s, k, e) == max(math.ceil(exact * k / e), 1)
    assert RULES["flaxformer"](f, s, k, e) == max(round(f * s / e), 4)
    assert RULES["mesh"](f, s, k, e) == max(min(s, int(s * f / e)), 4)
    assert RULES["vmoe"](f, s, k, e) == max(vmoe + (-vmoe) % 4, 4)


@pytest.mark.parametrize("name", ["first_come", "batch_priority", "random_order", "reroute"])
@pytest.mark.parametrize("rule", [*RULES, "absolute"])
def test_every_policy_takes_every_rule(name: str, rule: str) -> None:
    options = {"limit": 3} if rule == "absolute" else {"factor": 1.25, "eval_factor": 2.0}
    admit, record = policy(name, rule=rule, **options), routing(24, 3, 2)
    if rule == "absolute":
        assert admit.limit(record) == admit.eval().limit(record) == 3
    else:
        assert admit.limit(record) == RULES[rule](1.25, 24, 2, 3)
        assert admit.eval().limit(record) == RULES[rule](2.0, 24, 2, 3)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": -1}, "limit"),
        ({"limit": 2, "factor": 1.0}, "limit"),
        ({"factor": 0.0}, "factor"),
        ({"factor": float("nan")}, "factor"),
        ({"eval_factor": float("inf")}, "eval_factor"),
        ({"rule": "swich"}, "rule"),
        ({"rule": "absolute"}, "limit"),
    ],
)
def test_impossible_limits_are_refused_by_name(options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Limit(**options)
    assert caught.value.field == field
