"""Limit rules: how many slots a (group, expert) has. Libraries use different formulas; each has a
name.

S tokens per group, k choices per token, E experts, f the capacity factor. All are static numbers:
a limit never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moezoo.errors import ConfigError, did_you_mean
from moezoo.records import Assignment, Routing


def switch(f: float, s: int, k: int, e: int) -> int:
    """ceil(f S k / E) (Switch Transformers, eq. 3, for k choices); at least 1."""
    return max(_ceil(f * s * k / e), 1)


def flaxformer(f: float, s: int, k: int, e: int) -> int:
    """max(round_half_even(f S / E), 4); ignores k."""
    return max(round(f * s / e), 4)


def mesh(f: float, s: int, k: int, e: int) -> int:
    """max(min(S, int(S f / E)), 4), as Mesh TensorFlow; ignores k."""
    return max(min(s, int(s * f / e)), 4)


def vmoe(f: float, s: int, k: int, e: int) -> int:
    """ceil(S k f / E), rounded up to a multiple of 4 (V-MoE); at least 4."""
    return max(_ceil(s * k * f / e) + 3, 4) // 4 * 4


def _ceil(value: float) -> int:
    # 1.1 * 10 is 11.000000000000002 in binary: without the tolerance it would round up to 12.
    return math.ceil(value - 1e-9 * max(value, 1.0))


RULES: dict[str, Callable[[float, int, int, int], int]] = {
    "switch": switch,
    "flaxformer": flaxformer,
    "mesh": mesh,
    "vmoe": vmoe,
}


class Limit:
    """A limit as configured: an absolute number, or a rule with a factor for training and one for
    evaluation.

    Args:
        factor: capacity factor in training, finite and > 0. None with `limit` None: 1.25.
        eval_factor: the same in evaluation; None: as in training.
        limit: an absolute number of slots, >= 1; excludes the factors.
        rule: "switch", "flaxformer", "mesh", "vmoe", or "absolute" (then `limit` is required).

    Raises ConfigError naming the option at fault.
    """

    def __init__(
        self,
        factor: float | None = None,
        eval_factor: float | None = None,
        limit: int | None = None,
        rule: str = "switch",
    ) -> None:
        if rule not in (*RULES, "absolute"):
            hint = did_you_mean(rule, [*RULES, "absolute"])
            raise ConfigError(f"unknown capacity rule {rule!r}", field="rule", hint=hint)
        if rule == "absolute" and limit is None:
            raise ConfigError("rule='absolute' needs a limit", field="limit", hint="Pass limit=...")
        if limit is not None:
            _check_absolute(limit, factor, eval_factor)
        for name, value in (("factor", factor), ("eval_factor", eval_factor)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be finite and > 0", field=name, found=value)
        self.absolute = limit
        self.factor = 1.25 if factor is None else float(factor)
        self.eval_factor = self.factor if eval_factor is None else float(eval_factor)
        self.rule = "absolute" if limit is not None else rule

    def slots(self, routing: Routing, *, training: bool) -> int:
        """Slots per (group, expert) for this routing."""
        if self.absolute is not None:
            return self.absolute
        a = routing.assignment
        assert isinstance(a, Assignment)  # the layer refuses soft routers with a policy
        factor = self.factor if training else self.eval_factor
        choices = a.choices or -(-a.num_pairs // max(a.num_tokens, 1)) or 1
        return RULES[self.rule](factor, a.group_size, choices, a.num_experts)

    def __repr__(self) -> str:
        if self.absolute is not None:
            return f"limit={self.absolute}"
        return f"factor={self.factor}, eval_factor={self.eval_factor}, rule={self.rule!r}"


def _check_absolute(limit: int, factor: float | None, eval_factor: float | None) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        hint = "An expert without a slot drops every token."
        raise ConfigError(
            "limit must be a whole number >= 1", field="limit", found=repr(limit), hint=hint
        )
    if factor is not None or eval_factor is not None:
        raise ConfigError(
            "limit and factor exclude each other", field="limit", hint="Pass one of them."
        )
