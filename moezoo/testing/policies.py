"""Invariants of capacity policies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from moezoo import capacity
from moezoo.capacity.base import CapacityPolicy
from moezoo.capacity.dropless import Dropless
from moezoo.errors import ConfigError
from moezoo.records import Assignment, Routing
from moezoo.registry import Spec
from moezoo.testing.gradients import DTYPES, Outcome, check_gradients
from moezoo.testing.invariants import Case, Invariant, Promises, same, seeded
from moezoo.testing.state import state_invariants
from moezoo.testing.strategies import cases, routing_of, without

Subject = str | dict[str, Any] | type[CapacityPolicy] | Callable[[int], CapacityPolicy]


def check_policy(
    subject: Subject,
    *,
    examples: int | None = None,
    device: str = "cpu",
) -> None:
    """Verify everything that a capacity policy's declared properties promise, for one and two
    choices per token.

    Args:
        subject: a registered name or spec, a policy class, or a function limit -> policy. Names and
            classes are built with `limit=...` where their constructor takes it.
        examples: cases per invariant; None: hypothesis' current profile.
        device: where component and inputs live, as "cuda".

    Raises InvariantBroken naming the promise and the smallest input that breaks it.
    """
    policy_promises(subject, device=device).verify(examples)


def policy_promises(subject: Subject, *, device: str = "cpu") -> Promises:
    """What `check_policy` verifies."""
    checks = _Checks(subject)
    invariants: dict[str, tuple[str, Invariant]] = {
        "only clears": (
            "pairs are cleared, reordered or moved, never invented",
            checks.only_clears,
        ),
        "limit": ("never more than C pairs per group and expert", checks.limit),
        "no waste": ("an expert with room left drops nobody", checks.no_waste),
        "monotone": ("more capacity never drops a kept pair", checks.monotone),
        "roomy": ("capacity for all equals dropless bit for bit", checks.roomy),
        "input": ("the proposed routing is never changed", checks.input_unchanged),
        "groups": ("a group is admitted as if it were alone", checks.groups),
        "gradient": ("gradients of weights and scores are right in float64", checks.gradient),
        "dtypes": ("weights of any dtype keep it, and who is kept", checks.dtypes),
        **state_invariants(lambda case: checks.build(2)),
    }
    sample = checks.build(2)
    if not sample.counts_padding:
        invariants["padding"] = ("padding takes no capacity", checks.padding)
    if sample.causal:
        invariants["causal"] = ("later tokens never change who is kept", checks.causal)
    strategy = cases(max_group=10, max_experts=4, device=device)
    once = frozenset({"reset", "buffers"})
    return Promises(checks.label, invariants, strategy, once, Case(device=device))


class _Checks:
    """The invariants of one subject; each takes a case and asserts."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.label = (
            subject if isinstance(subject, str) else getattr(subject, "__name__", str(subject))
        )

    def build(self, limit: int) -> CapacityPolicy:
        """The policy with `limit` slots, or with its own limit where that cannot be set."""
        subject = self.subject
        if isinstance(subject, (str, dict)):
            spec = Spec.parse(subject)
            try:
                return capacity.build(Spec(spec.name, {**spec.options, "limit": limit}))
            except ConfigError:
                return capacity.build(spec)
        if isinstance(subject, type):
            known = inspect.signature(subject).parameters
            options: dict[str, Any] = {"limit": limit} if "limit" in known else {}
            return cast(CapacityPolicy, subject(**options))
        return subject(limit)

    def admit(
        self, case: Case, choices: int, *, limit: int | None = None
    ) -> tuple[Routing, Assignment]:
        """A routing of the case and what the policy admits of it; `limit` None: 1 to 3 slots."""
        routing = routing_of(case, choices)
        policy = self.build(1 + case.seed % 3 if limit is None else limit).train(case.training)
        with seeded(case.seed):
            return routing, policy(routing)

    def only_clears(self, case: Case) -> None:
        for choices in (1, 2):
            routing, admitted = self.admit(case, choices)
            offered = _sparse(routing)
            admitted.check(routing.real)
            assert admitted.num_pairs == offered.num_pairs, "the number of pairs changed"
            before, after = _weights(offered), _weights(admitted)
            moves = self.build(1).moves
            for pair, weight in after.items():
                assert moves or pair in before, f"pair {pair} was never proposed"
                if pair in before:
                    assert weight == before[pair], f"the weight of {pair} changed"

    def limit(self, case: Case) -> None:
        for choices in (1, 2):
            routing, admitted = self.admit(case, choices)
            slots = self._slots(case, routing)
            if slots is not None:
                worst = int(_loads(admitted).max()) if admitted.num_pairs else 0
                assert worst <= slots, f"{worst} pairs at an expert with {slots} slots"

    def no_waste(self, case: Case) -> None:
        for choices in (1, 2):
            routing, admitted = self.admit(case, choices)
            slots = self._slots(case, routing)
            if slots is None or self.build(1).counts_padding:
                continue
            offered, kept = _loads(_sparse(routing)), _loads(admitted)
            wanted = offered.clamp(max=slots)
            assert bool((kept >= wanted).all()), (
                f"kept {kept.tolist()} of {offered.tolist()}, C {slots}"
            )
            if not self.build(1).moves:
                assert torch.equal(kept, wanted), f"kept {kept.tolist()}, C {slots}"

    def monotone(self, case: Case) -> None:
        for choices in (1, 2):
            previous: set[tuple[int, int]] = set()
            for limit in (1, 2, 3, 5):
                routing, admitted = self.admit(case, choices, limit=limit)
                kept = set(_weights(admitted))
                tokens = {token for token, _ in kept}
                if self.build(1).moves:  # a token may be kept elsewhere, but stays kept
                    lost = {token for token, _ in previous} - tokens
                else:
                    lost = {token for token, _ in previous - kept}
                assert not lost, f"tokens {sorted(lost)} are kept with less than {limit} slots only"
                previous = kept

    def roomy(self, case: Case) -> None:
        for choices in (1, 2):
            routing, admitted = self.admit(case, choices, limit=max(case.group_size, 1))
            if self._slots(case, routing, limit=max(case.group_size, 1)) not in (
                None,
                case.group_size,
            ):
                continue  # its limit cannot be set, so it may bind
            expected = Dropless()(routing)
            ours, theirs = _weights(admitted), _weights(expected)
            assert ours == theirs, f"kept {sorted(ours)} instead of {sorted(theirs)}"

    def input_unchanged(self, case: Case) -> None:
        routing = routing_of(case, 2)
        a = _sparse(routing)
        before = [t.clone() for t in (a.token, a.expert, a.weight, a.kept)]
        self.build(1).train(case.training)(routing)
        same([a.token, a.expert, a.weight, a.kept], before, "the proposed assignment")

    def gradient(self, case: Case) -> None:
        for choices in (1, 2):
            plain = routing_of(case, choices)
            offered = _sparse(plain)
            policy = self.build(1 + case.seed % 3).train(case.training)
            leaf = case.noise(case.num_tokens, case.num_experts, purpose=2).double()
            leaf.requires_grad_()

            def run(
                plain: Routing = plain,
                offered: Assignment = offered,
                policy: CapacityPolicy = policy,
                leaf: Tensor = leaf,
            ) -> Outcome:
                probs = leaf.softmax(-1)
                weight = probs[offered.token, offered.expert]
                with seeded(case.seed):
                    a = policy(
                        replace(
                            plain, assignment=replace(offered, weight=weight), logits=leaf,
                            probs=probs,
                        )
                    )  # fmt: skip
                return Outcome([torch.where(a.kept, a.weight, 0.0)], [a.token, a.expert, a.kept])

            check_gradients(run, {"the scores": leaf}, case)

    def dtypes(self, case: Case) -> None:
        routing = routing_of(case, 2)
        offered = _sparse(routing)
        for dtype in (torch.float64, *DTYPES):
            weight = offered.weight.to(dtype)
            given = replace(routing, assignment=replace(offered, weight=weight))
            with seeded(case.seed):
                admitted = self.build(1 + case.seed % 3).train(case.training)(given)
            assert admitted.weight.dtype == dtype, f"{dtype} weights are {admitted.weight.dtype}"
            before, after = _weights(_sparse(given)), _weights(admitted)
            wrong = [pair for pair, w in after.items() if pair in before and before[pair] != w]
            assert not wrong, f"the weights of {wrong} changed in {dtype}"

    def groups(self, case: Case) -> None:
        if case.groups == 1 or case.group_size == 0 or self._draws():
            return
        routing, admitted = self.admit(case, 1)
        whole = set(_weights(admitted))
        policy = self.build(1 + case.seed % 3).train(case.training)
        for group in range(case.groups):
            mine = torch.arange(case.num_tokens, device=case.device) // case.group_size == group
            alone = policy(without(routing, mine, case.group_size))
            start = group * case.group_size
            kept = {(token + start, expert) for token, expert in _weights(alone)}
            inside = {p for p in whole if start <= p[0] < start + case.group_size}
            assert kept == inside, f"group {group}: {sorted(inside)}, alone {sorted(kept)}"

    def padding(self, case: Case) -> None:
        routing, admitted = self.admit(case, 1)
        if routing.real is None or case.groups != 1 or self._draws() or self._slots_vary():
            return
        policy = self.build(1 + case.seed % 3).train(case.training)
        places = routing.real.nonzero().flatten().tolist()
        alone = policy(without(routing, routing.real, len(places)))
        kept = {(places[token], expert) for token, expert in _weights(alone)}
        assert kept == set(_weights(admitted)), "removing padding changes who is kept"

    def causal(self, case: Case) -> None:
        many = self.build(1).causal_for_many
        for choices in (1, 2) if many else (1,):
            routing, admitted = self.admit(case, choices)
            before = set(_weights(admitted))
            for cut in range(1, case.num_tokens):
                other = _with_other_future(case, routing, cut, choices)
                policy = self.build(1 + case.seed % 3).train(case.training)
                after = set(_weights(policy(other)))
                changed = {p for p in before ^ after if p[0] < cut}
                assert not changed, f"pairs {sorted(changed)} change with tokens from {cut} on"

    def _slots(self, case: Case, routing: Routing, limit: int | None = None) -> int | None:
        policy = self.build(1 + case.seed % 3 if limit is None else limit).train(case.training)
        return policy.limit(routing)

    def _slots_vary(self) -> bool:
        """Whether the limit depends on the group's size, padding included."""
        long, short = (routing_of(Case(group_size=n)) for n in (800, 4))  # above any least limit
        policy = self.build(2).train()
        return policy.limit(long) != policy.limit(short)

    def _draws(self) -> bool:
        """Whether the order of pairs is drawn at random."""
        routing = routing_of(Case(group_size=12, num_experts=1))
        kept = []
        for seed in range(4):
            with seeded(seed):
                kept.append(frozenset(_weights(self.build(3).train()(routing))))
        return len(set(kept)) > 1


def _sparse(routing: Routing) -> Assignment:
    assert isinstance(routing.assignment, Assignment)
    return routing.assignment


def _weights(a: Assignment) -> dict[tuple[int, int], float]:
    """Kept pairs (token, expert) with their weights."""
    pairs = zip(a.token[a.kept].tolist(), a.expert[a.kept].tolist(), strict=True)
    return dict(zip(pairs, a.weight[a.kept].tolist(), strict=True))


def _loads(a: Assignment) -> Tensor:
    """Kept pairs per group and expert (G * E,)."""
    key = (a.token // max(a.group_size, 1)) * a.num_experts + a.expert
    loads = a.token.new_zeros(max(a.num_groups, 1) * a.num_experts)
    return loads.index_add_(0, key, a.kept.long())


def _with_other_future(case: Case, routing: Routing, cut: int, choices: int) -> Routing:
    """The routing with other choices for tokens from `cut` on."""
    other = routing_of(Case(**{**case.__dict__, "seed": case.seed + 7}), choices)
    a, b = _sparse(routing), _sparse(other)
    later = a.token >= cut
    mixed = Assignment(
        token=a.token,
        expert=torch.where(later, b.expert, a.expert),
        weight=torch.where(later, b.weight, a.weight),
        kept=a.kept,
        num_tokens=a.num_tokens,
        num_experts=a.num_experts,
        group_size=a.group_size,
        choices=a.choices,
    )
    assert routing.probs is not None
    assert other.probs is not None
    rows = (torch.arange(a.num_tokens, device=a.token.device) >= cut)[:, None]
    probs = torch.where(rows, other.probs, routing.probs)
    return Routing(mixed, logits=probs.log(), probs=probs, real=routing.real)
