"""How an invariant is run: many drawn cases, and the smallest one that breaks it in the message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moezoo.errors import MoezooError
from moezoo.records import Tokens

D_MODEL, VOCABULARY = 6, 24


# Invariants that hold because a component declares so, and the attribute that declares it.
_DECLARED = {
    "causal": "causal",
    "deterministic": "deterministic",
    "batch_invariant": "batch_invariant",
    "token order": "batch_invariant",
}


class InvariantBroken(AssertionError):
    """A component does not keep a promise.

    Attributes: component, invariant (its name), claim (what was promised), case (the smallest input
    found that breaks it).
    """

    def __init__(
        self, component: str, invariant: str, claim: str, case: object, reason: str
    ) -> None:
        self.component, self.invariant, self.claim, self.case = component, invariant, claim, case
        lines = [
            f"{component} breaks {invariant!r}: {claim}.",
            f"  how:            {reason}",
            f"  smallest input: {case}",
        ]
        if isinstance(case, Case):
            lines.append(f"                  ({case.described()}; `error.case.tokens()` makes it)")
        if invariant in _DECLARED:
            name = _DECLARED[invariant]
            lines.append(
                f"  way out:        {component} promises this by `{name} = True`: repair its "
                f"forward or, if it is meant so, declare `{name} = False`."
            )
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Case:
    """Sizes and a seed from which all inputs of a check follow.

    group_size * groups tokens; `padded` marks about a third of them as padding; `ties` rounds
    activations so that equal scores occur; `device` holds component and inputs, which are drawn on
    the CPU: a case is the same on every device.
    """

    group_size: int = 4
    groups: int = 1
    num_experts: int = 4
    seed: int = 0
    padded: bool = False
    training: bool = False
    ties: bool = False
    device: str = "cpu"

    @property
    def num_tokens(self) -> int:
        return self.group_size * self.groups

    def described(self) -> str:
        """The sizes in words."""
        parts = [f"{self.groups} x {self.group_size} tokens (groups x tokens per group)"]
        parts.append(f"{self.num_experts} experts")
        parts += ["padding"] * self.padded + ["equal scores"] * self.ties
        parts += [f"on {self.device}"] * (self.device != "cpu")
        return ", ".join([*parts, "training" if self.training else "evaluation"])

    def generator(self, purpose: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1009 + purpose)

    def tokens(self, dtype: torch.dtype = torch.float32) -> Tokens:
        """The token batch of this case (T, D_MODEL)."""
        source = self.generator()
        x = torch.randn(self.num_tokens, D_MODEL, generator=source, dtype=torch.float64)
        if self.ties:
            x = x.round()
        ids = torch.randint(VOCABULARY, (self.num_tokens,), generator=source)
        real = torch.rand(self.num_tokens, generator=source) < 0.67 if self.padded else None
        real = None if real is None else real.to(self.device)
        return Tokens(x.to(self.device, dtype), ids.to(self.device), real, self.group_size)

    def noise(self, *shape: int, purpose: int = 1) -> Tensor:
        """Further random numbers of this case."""
        return torch.randn(shape, generator=self.generator(purpose)).to(self.device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from this seed, and afterwards as if there had been none: those of the CPU,
    and of the current GPU where torch has begun to use one.

    `torch.manual_seed` writes down three stack traces for devices that nobody uses: it took half
    of a case's time.
    """
    state = torch.get_rng_state()
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    on_gpu = torch.cuda.get_rng_state() if used else None
    torch.default_generator.manual_seed(seed)
    if on_gpu is not None:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


Invariant = Callable[[Case], None]


@dataclass(frozen=True)
class Promises:
    """What a component promises.

    Attributes: component (its name), invariants (by name: the claim, and what checks a case), cases
    (the strategy that draws them), once (names of invariants that `sample`, a single case, says
    enough about).
    """

    component: str
    invariants: Mapping[str, tuple[str, Invariant]]
    cases: SearchStrategy[Case]
    once: frozenset[str] = frozenset()
    sample: Case = Case()

    def verify(self, examples: int | None = None) -> None:
        """Check each invariant. Raises InvariantBroken for the first broken one."""
        for name in self.invariants:
            self.verify_one(name, examples)

    def verify_one(self, name: str, examples: int | None = None) -> int:
        """Check one invariant; returns how many cases there were, which are less than `examples`
        where no more can be drawn. Raises InvariantBroken.
        """
        claim, invariant = self.invariants[name]
        if name in self.once:
            failure = _failure(invariant, self.sample)
            if failure is not None:
                raise InvariantBroken(
                    self.component, name, claim, self.sample, failure[0]
                ) from None
            return 1
        return _verify_one(self.component, name, claim, invariant, self.cases, examples)


def _verify_one(
    component: str,
    name: str,
    claim: str,
    invariant: Invariant,
    strategy: SearchStrategy[Case],
    examples: int | None,
) -> int:
    last: list[tuple[Case, str]] = []
    count = 0

    def holds(case: Case) -> None:
        nonlocal count
        count += 1
        failure = _failure(invariant, case)
        if failure is not None:
            last.append((case, failure[0]))
            raise failure[1]

    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors]
    # Not Phase.explain, which runs the case again for hundreds of variants that nobody reads.
    phases = (Phase.generate, Phase.shrink)
    run = settings(
        deadline=None, database=None, print_blob=False, suppress_health_check=quiet, phases=phases
    )
    if examples is not None:
        run = settings(run, max_examples=examples)
    try:
        run(given(strategy)(holds))()
    except Exception:
        if not last:
            raise
        # hypothesis runs the smallest failing case last.
        case, reason = last[-1]
        raise InvariantBroken(component, name, claim, case, reason) from None
    return count


def _failure(invariant: Invariant, case: Case) -> tuple[str, Exception] | None:
    """What a case breaks, in words, and the error; None when it holds."""
    try:
        invariant(case)
    except (AssertionError, MoezooError, RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()
        said = reason[0] if reason else repr(error)
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return kind + said, error
    return None


def same(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Assert that tensors are equal to the bit."""
    assert len(found) == len(expected), f"{what}: {len(found)} values instead of {len(expected)}"
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        assert torch.equal(a, b), f"{what}: {_difference(a, b)}"


def close(found: Tensor, expected: Tensor, what: str, *, atol: float = 1e-5) -> None:
    """Assert that two tensors are equal up to rounding."""
    assert found.shape == expected.shape, (
        f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    )
    fine = torch.allclose(found, expected, atol=atol, rtol=1e-4)
    assert fine, f"{what}: {_difference(found, expected)}"


def _difference(a: Tensor, b: Tensor) -> str:
    if a.numel() <= 12:
        return f"{a.flatten().tolist()} instead of {b.flatten().tolist()}"
    count = int((a != b).sum())
    return f"{count} of {a.numel()} entries differ"
