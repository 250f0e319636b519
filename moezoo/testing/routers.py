"""Invariants of routers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moezoo import routers
from moezoo.records import Assignment, Routing, SoftAssignment, Tokens
from moezoo.registry import Spec
from moezoo.routers.base import Router
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
    invariants |= {
        "input": ("the caller's tokens are never changed", checks.input_unchanged),
        "padding": ("what padding holds never matters", checks.padding),
        "precision": ("gates are float32 in bfloat16 models and under autocast", checks.precision),
        "evaluation": ("evaluation draws no random numbers", checks.evaluation),
        "gradient": ("every parameter gets a finite gradient", checks.gradient),
        "gradcheck": ("gradients are right in float64", checks.gradcheck),
        "copies": ("a deep copy and a loaded state dict route alike", checks.copies),
    }
    strategy = cases(max_group=8, max_groups=2, max_experts=5, device=device)
    return Promises(checks.label, invariants, strategy)


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

    def route(self, case: Case, tokens: Tokens, router: Router | None = None) -> Routing:
        """The routing of `tokens` with the case's seed, by the case's router."""
        router = router or self.build(case)
        with seeded(case.seed + 1):
            routing: Routing = router(tokens)
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
            _check_choices(routing.assignment, router.choices)

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
        for tensor in (*_weights(routing), routing.logits, routing.probs):
            if tensor is not None:
                assert tensor.dtype == torch.float32, f"gates are {tensor.dtype}"

    def evaluation(self, case: Case) -> None:
        router, tokens = self.build(case).eval(), case.tokens()
        if not router.deterministic and type(router).__name__ == "RandomRouter":
            return
        with seeded(1):
            first = router(tokens)
            second = router(tokens)
        same(decisions(second), decisions(first), "two evaluations differ")

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
            if _alike(found, expected, cut):
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
        router = self.build(case)
        if case.num_tokens == 0 or not any(p.requires_grad for p in router.parameters()):
            return
        routing = router(case.tokens())
        outputs = [t for t in (*_weights(routing), routing.probs, *routing.losses.values())
                   if t is not None and t.requires_grad]  # fmt: skip
        if not outputs:
            return
        torch.autograd.backward([output.sum() for output in outputs])
        for name, parameter in router.named_parameters():
            gradient = parameter.grad
            fine = gradient is None or bool(torch.isfinite(gradient).all())
            assert fine, f"the gradient of {name} is not finite"

    def gradcheck(self, case: Case) -> None:
        if case.ties or case.num_tokens == 0 or case.num_tokens > 6:
            return  # at a tie the choice jumps, and no difference quotient is a gradient
        router = self.build(case).double().eval()
        tokens = case.tokens(torch.float64)
        probe = _weights(router(tokens))
        if not any(weight.requires_grad for weight in probe):
            return

        def weights(x: Tensor) -> tuple[Tensor, ...]:
            return _weights(router(Tokens(x, tokens.ids, tokens.real, tokens.group_size)))

        x = tokens.x.clone().requires_grad_()
        torch.autograd.gradcheck(weights, (x,), eps=1e-7, atol=1e-4)

    def copies(self, case: Case) -> None:
        router, tokens = self.build(case).eval(), case.tokens()
        if not router.deterministic and type(router).__name__ == "RandomRouter":
            return
        fresh = self.build(replace(case, seed=case.seed + 1)).eval()
        fresh.load_state_dict(router.state_dict(), strict=True)
        for twin in (copy.deepcopy(router), fresh):
            same(decisions(twin(tokens)), decisions(router(tokens)), "a copy routes differently")


def decisions(routing: Routing) -> list[Tensor]:
    """What a routing decides, as tensors: kept pairs in order with weights, or the soft maps."""
    a = routing.assignment
    if isinstance(a, SoftAssignment):
        return [a.dispatch, a.combine]
    return [a.token[a.kept], a.expert[a.kept], a.weight[a.kept]]


def pairs_of_token(routing: Routing, token: int) -> tuple[list[int], Tensor]:
    """A token's kept pairs: experts in order, and their weights."""
    a = routing.assignment
    assert isinstance(a, Assignment), "a soft routing has no pairs"
    mine = (a.token == token) & a.kept
    return a.expert[mine].tolist(), a.weight[mine].detach()


def same_pairs(
    found: tuple[list[int], Tensor], expected: tuple[list[int], Tensor], what: str
) -> None:
    """Assert that a token's pairs are equal, weights up to rounding."""
    assert found[0] == expected[0], f"{what} goes to experts {found[0]} instead of {expected[0]}"
    close(found[1], expected[1], f"{what} has other weights")


def _alike(found: Routing, expected: Routing, cut: int) -> bool:
    """Whether tokens before `cut` have equal pairs, weights up to rounding: all of them at once,
    which is quicker than one by one, but names none.
    """
    pairs = []
    for routing in (found, expected):
        a = routing.assignment
        assert isinstance(a, Assignment), "a soft routing has no pairs"
        mine = ((a.token < cut) & a.kept).nonzero()[:, 0]
        mine = mine[a.token[mine].argsort(stable=True)]
        pairs.append((a.token[mine], a.expert[mine], a.weight[mine].detach()))
    (token, expert, weight), (old_token, old_expert, old_weight) = pairs
    if not torch.equal(token, old_token) or not torch.equal(expert, old_expert):
        return False
    return torch.allclose(weight, old_weight, atol=1e-5, rtol=1e-4)


def _weights(routing: Routing) -> tuple[Tensor, ...]:
    a = routing.assignment
    return (a.dispatch, a.combine) if isinstance(a, SoftAssignment) else (a.weight,)


def _check_choices(a: Assignment, choices: int) -> None:
    counts = a.token.new_zeros(a.num_tokens)
    counts.index_add_(0, a.token, torch.ones_like(a.token))
    assert bool((counts == choices).all()), f"pairs per token {counts.tolist()}, promised {choices}"
    assert a.choices == choices, f"Assignment.choices is {a.choices}, promised {choices}"
