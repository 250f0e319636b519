"""Invariants of routers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moezoo import routers
from moezoo.records import Assignment, Routing, SoftAssignment, Tokens
from moezoo.registry import Spec
from moezoo.routers.base import Router
from moezoo.testing.gradients import (
    DTYPES,
    Outcome,
    check_gradients,
    check_narrow,
    check_reached,
    leaves_of,
)
from moezoo.testing.invariants import (
    D_MODEL,
    VOCABULARY,
    Case,
    Invariant,
    Promises,
    close,
    same,
    seeded,
)
from moezoo.testing.routings import (
    alike,
    check_choices,
    decisions,
    pairs_of_token,
    same_pairs,
    weights_of,
)
from moezoo.testing.state import check_copies, state_invariants
from moezoo.testing.strategies import cases

Subject = str | dict[str, Any] | type[Router] | Callable[[int, int], Router]


def check_router(
    subject: Subject,
    *,
    examples: int | None = None,
    device: str = "cpu",
) -> None:
    """Verify everything that a router's declared properties promise.

    Args:
        subject: a registered name or spec, a Router class whose constructor takes d_model and
            num_experts, or a function (d_model, num_experts) -> Router.
        examples: cases per invariant; None: hypothesis' current profile.
        device: where component and inputs live, as "cuda".

    Raises InvariantBroken naming the promise and the smallest input that breaks it.
    """
    router_promises(subject, device=device).verify(examples)


def router_promises(subject: Subject, *, device: str = "cpu") -> Promises:
    """What `check_router` verifies."""
    checks = _Checks(subject)
    invariants: dict[str, tuple[str, Invariant]] = {
        **state_invariants(lambda case: checks._construct(case.num_experts)),
        "records": ("assignment, logits, probs and losses are as declared", checks.records),
    }
    sample = checks.build(Case(device=device))
    if sample.deterministic:
        invariants["deterministic"] = (
            "the same tokens give the same routing in training too",
            checks.deterministic,
        )
    if sample.causal:
        invariants["causal"] = ("later tokens never change an earlier token's pairs", checks.causal)
    if sample.batch_invariant and sample.deterministic:
        invariants["batch_invariant"] = (
            "a token is routed alone as within a batch",
            checks.batch_invariant,
        )
        invariants["token order"] = (
            "reordering tokens reorders their pairs and nothing else",
            checks.token_order,
        )
    if sample.takes_given:
        invariants["given"] = (
            "its own pairs, given to it, weigh what they weigh when it chooses them",
            checks.given,
        )
    invariants |= {
        "input": ("the caller's tokens are never changed", checks.input_unchanged),
        "padding": ("what padding holds never matters", checks.padding),
        "precision": ("gates are float32 in bfloat16 models and under autocast", checks.precision),
        "evaluation": ("evaluation draws no random numbers", checks.evaluation),
        "gradient": ("every parameter gets a finite gradient in training", checks.gradient),
        "gradcheck": (
            "gradients of tokens and of every parameter are right in float64",
            checks.gradcheck,
        ),
        "dtypes": ("half precision gives float64's routing and gradients, rounded", checks.dtypes),
        "balancing": ("what `adapt` does in bfloat16 it does as in float32", checks.balancing),
        "copies": ("a deep copy and a loaded state dict route alike", checks.copies),
    }
    strategy = cases(max_group=8, max_groups=2, max_experts=5, device=device)
    once = frozenset({"reset", "buffers"})
    return Promises(checks.label, invariants, strategy, once, Case(device=device))


class _Checks:
    """The invariants of one subject; each takes a case and asserts."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.label = (
            subject if isinstance(subject, str) else getattr(subject, "__name__", str(subject))
        )

    def build(self, case: Case) -> Router:
        """The router of a case, its weights from the case's seed."""
        with seeded(case.seed):
            router = self._construct(case.num_experts)
            with torch.no_grad():
                for parameter in router.parameters():
                    if parameter.dim() == 2:
                        parameter.normal_()
                        if case.ties:
                            parameter.round_()
        return router.train(case.training).to(case.device)

    def _construct(self, num_experts: int) -> Router:
        sizes = {"d_model": D_MODEL, "num_experts": num_experts, "vocab_size": VOCABULARY}
        subject = self.subject
        if isinstance(subject, (str, dict)):
            spec = Spec.parse(subject)
            options = dict(spec.options)
            known = routers.registry.get(spec.name).__init__.__annotations__
            if "k" in known:
                options["k"] = min(options.get("k", 2), num_experts)
            return routers.build(Spec(spec.name, options), **sizes)
        return subject(D_MODEL, num_experts)

    def route(
        self, case: Case, tokens: Tokens, router: Router | None = None, *given: Assignment
    ) -> Routing:
        """The routing of `tokens` with the case's seed, by the case's router."""
        router = router or self.build(case)
        with seeded(case.seed + 1):
            routing: Routing = router(tokens, *given)
        return routing

    def records(self, case: Case) -> None:
        router, tokens = self.build(case), case.tokens()
        routing = router(tokens)
        routing.assignment.check(tokens.real)
        soft = isinstance(routing.assignment, SoftAssignment)
        assert soft == router.soft, f"soft is {router.soft}, the assignment says {soft}"
        for name, declared in (("logits", router.has_logits), ("probs", router.has_probs)):
            scores = getattr(routing, name)
            given = scores is not None
            assert given == declared, f"has_{name} is {declared}, but {name} given: {given}"
            wanted = (case.num_tokens, case.num_experts)
            assert scores is None or scores.shape == wanted, f"{name} is {tuple(scores.shape)}"
        if routing.probs is not None:
            ones = torch.ones(case.num_tokens, device=case.device)
            close(routing.probs.sum(-1), ones, "rows of probs do not sum to 1")
        names = set(routing.losses)
        assert names == router.own_losses, f"losses {names}, declared {set(router.own_losses)}"
        assert all(torch.isfinite(loss) for loss in routing.losses.values()), "a loss is not finite"
        if isinstance(routing.assignment, Assignment) and router.choices:
            check_choices(routing.assignment, router.choices)

    def input_unchanged(self, case: Case) -> None:
        router, tokens = self.build(case), case.tokens()
        before = tokens.x.clone()
        router(tokens)
        same([tokens.x], [before], "tokens.x after routing")

    def padding(self, case: Case) -> None:
        tokens = case.tokens()
        if tokens.real is None:
            return
        garbage = torch.where(tokens.real[:, None], tokens.x, float("nan"))
        other = Tokens(garbage, tokens.ids, tokens.real, tokens.group_size)
        found, expected = self.route(case, other), self.route(case, tokens)
        same(decisions(found), decisions(expected), "NaN in padding changed the routing")

    def precision(self, case: Case) -> None:
        router, tokens = self.build(case).bfloat16(), case.tokens(torch.bfloat16)
        with torch.autocast(torch.device(case.device).type, dtype=torch.bfloat16):
            routing = router(tokens)
        for tensor in (*weights_of(routing), routing.logits, routing.probs):
            if tensor is not None:
                assert tensor.dtype == torch.float32, f"gates are {tensor.dtype}"

    def evaluation(self, case: Case) -> None:
        router, tokens = self.build(case).eval(), case.tokens()
        with seeded(1):
            first = router(tokens)
            second = router(tokens)
        same(decisions(second), decisions(first), "two evaluations differ")

    def given(self, case: Case) -> None:
        router, tokens = self.build(case), case.tokens()
        expected = self.route(case, tokens, router)
        pairs = expected.assignment
        assert isinstance(pairs, Assignment), "a soft router takes no pairs"
        unweighed = replace(pairs, weight=torch.zeros_like(pairs.weight))
        found = self.route(case, tokens, router, unweighed)
        same(decisions(found), decisions(expected), "a router's own pairs, given to it,")

    def deterministic(self, case: Case) -> None:
        router, tokens = self.build(case), case.tokens()
        same(decisions(router(tokens)), decisions(router(tokens)), "two calls differ")

    def causal(self, case: Case) -> None:
        tokens = case.tokens()
        router = self.build(case)
        expected = self.route(case, tokens, router)
        for cut in range(1, case.num_tokens):
            x = tokens.x.clone()
            x[cut:] = case.noise(case.num_tokens - cut, D_MODEL, purpose=3)
            later = Tokens(x, tokens.ids, tokens.real, tokens.group_size)
            found = self.route(case, later, router)
            if alike(found, expected, cut):
                continue
            for token in range(cut):
                mine, old = pairs_of_token(found, token), pairs_of_token(expected, token)
                same_pairs(mine, old, f"token {token}, with other tokens from {cut} on,")

    def batch_invariant(self, case: Case) -> None:
        router, tokens = self.build(case), case.tokens()
        whole = router(tokens)
        for token in range(case.num_tokens):
            row = slice(token, token + 1)
            real = None if tokens.real is None else tokens.real[row]
            ids = None if tokens.ids is None else tokens.ids[row]
            alone = router(Tokens(tokens.x[row], ids, real))
            mine, old = pairs_of_token(alone, 0), pairs_of_token(whole, token)
            same_pairs(mine, old, f"token {token} alone")

    def token_order(self, case: Case) -> None:
        router, tokens = self.build(case), case.tokens()
        order = torch.randperm(case.num_tokens, generator=case.generator(4)).to(case.device)
        real = None if tokens.real is None else tokens.real[order]
        ids = None if tokens.ids is None else tokens.ids[order]
        moved = router(Tokens(tokens.x[order], ids, real, tokens.group_size))
        plain = router(tokens)
        for new, old in enumerate(order.tolist()):
            mine, before = pairs_of_token(moved, new), pairs_of_token(plain, old)
            same_pairs(mine, before, f"token {old}, after reordering,")

    def gradient(self, case: Case) -> None:
        if case.num_tokens == 0:
            return
        router = self.build(case).train()
        outcome = self.outcome(case, router, case.tokens(), loose=True)
        check_reached(outcome, leaves_of(router), case)

    def gradcheck(self, case: Case) -> None:
        if case.ties or case.num_tokens == 0:
            return  # at a tie the choice jumps, and no difference quotient is a gradient
        router, tokens = self.build(case).double(), case.tokens(torch.float64)
        leaves = leaves_of(router, **{"tokens.x": tokens.x})
        check_gradients(lambda: self.outcome(case, router, tokens), leaves, case)

    def dtypes(self, case: Case) -> None:
        if case.ties:
            return
        for dtype in DTYPES:
            narrow = self.build(replace(case, training=False)).to(dtype)
            wide = copy.deepcopy(narrow).double()
            tokens = case.tokens(dtype)
            same_tokens = replace(tokens, x=tokens.x.double())
            sides = []
            for router, given in ((narrow, tokens), (wide, same_tokens)):
                leaves = leaves_of(router, **{"tokens.x": given.x})
                sides.append((self.outcome(case, router, given, loose=True), leaves))
            for value in sides[0][0].values:
                assert value.dtype == torch.float32, f"a gate in {dtype} is {value.dtype}"
            check_narrow(sides[0], sides[1], dtype, case)

    def outcome(
        self, case: Case, router: Router, tokens: Tokens, *, loose: bool = False
    ) -> Outcome:
        """What a router computes and decides. `loose`: weights that carry a gradient which their
        values do not follow are among it.
        """
        routing = self.route(case, tokens, router)
        a = routing.assignment
        values = [t for t in (routing.logits, routing.probs) if t is not None]
        values += [routing.losses[name] for name in sorted(routing.losses)]
        if isinstance(a, SoftAssignment):
            return Outcome([*values, a.dispatch, a.combine])
        if loose or not router.straight_through:
            values.append(torch.where(a.kept, a.weight, 0.0))
        return Outcome(values, [a.token, a.expert, a.kept])

    def balancing(self, case: Case) -> None:
        router = self.build(case)
        narrow = copy.deepcopy(router).bfloat16()
        routing = self.route(case, case.tokens(), router)
        for _ in range(3):
            router.adapt([routing])
            narrow.adapt([routing])
        pairs = zip(router.named_buffers(), narrow.buffers(), strict=True)
        for (name, expected), found in pairs:
            same([found], [expected], f"{name} after three steps of a bfloat16 model")

    def copies(self, case: Case) -> None:
        tokens = case.tokens()
        check_copies(self.build, lambda router: decisions(self.route(case, tokens, router)), case)
