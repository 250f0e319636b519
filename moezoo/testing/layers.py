"""Invariants of whole layers: router, policy and experts together."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from moezoo.layer import MoE
from moezoo.pairing import causality_refusal
from moezoo.records import Assignment
from moezoo.testing.gradients import DTYPES, Outcome, Side, check_gradients, check_narrow, leaves_of
from moezoo.testing.invariants import D_MODEL, Case, Invariant, Promises, close, same, seeded
from moezoo.testing.state import check_copies, state_invariants
from moezoo.testing.strategies import cases

Subject = Callable[[int, int], MoE]


def check_layer(
    subject: Subject,
    *,
    label: str | None = None,
    examples: int | None = None,
    device: str = "cpu",
) -> None:
    """Verify what a mixture-of-experts layer promises.

    Args:
        subject: a function (d_model, num_experts) -> MoE.
        label: what to call it in messages.
        examples: cases per invariant; None: hypothesis' current profile.
        device: where component and inputs live, as "cuda".

    Raises InvariantBroken naming the promise and the smallest input that breaks it.
    """
    layer_promises(subject, label=label, device=device).verify(examples)


def layer_promises(subject: Subject, *, label: str | None = None, device: str = "cpu") -> Promises:
    """What `check_layer` verifies."""
    checks = _Checks(subject)
    invariants: dict[str, tuple[str, Invariant]] = {
        "plain loop": ("equals a loop over pairs", checks.plain_loop),
        "padding": ("padding comes out as 0 and changes nothing, NaN or not", checks.padding),
        "input": ("x is never changed; y is like x", checks.input_unchanged),
        "dropped": ("a token without a kept pair gives 0 and no gradient", checks.dropped),
        "gradient": ("gradients of x and of every parameter are right in float64", checks.gradient),
        "inference": ("without a gradient it computes what it does with one", checks.inference),
        "dtypes": ("half precision gives float64's y and gradients, rounded", checks.dtypes),
        "copies": ("a deep copy and a loaded state dict compute alike", checks.copies),
        **state_invariants(lambda case: checks.construct(case)),
    }
    sample = checks.build(Case(device=device))
    if not sample.router.soft and causality_refusal(sample.router, sample.capacity) is None:
        invariants["prefill"] = (
            "in evaluation, token by token equals the whole sequence",
            checks.prefill,
        )
    name = label or str(getattr(subject, "__name__", "layer"))
    strategy = cases(max_group=6, max_groups=2, max_experts=4, device=device)
    once = frozenset({"reset", "buffers", "dtypes", "copies"})
    return Promises(name, invariants, strategy, once, Case(device=device, groups=2, padded=True))


class _Checks:
    """The invariants of one subject; each takes a case and asserts."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def build(self, case: Case) -> MoE:
        with seeded(case.seed):
            layer = self.construct(case)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.normal_()
        return layer.double().train(case.training).to(case.device)

    def construct(self, case: Case) -> MoE:
        """The layer as its constructor makes it."""
        return self.subject(D_MODEL, case.num_experts)

    def outcome(self, case: Case, layer: MoE, x: Tensor) -> Outcome:
        """y and who went where."""
        _, mask, ids = self.inputs(case)
        y, a = self.run(case, layer, x, mask, ids)
        return Outcome([y], [] if a is None else [a.token, a.expert, a.kept])

    def gradient(self, case: Case) -> None:
        layer = self.build(case)
        if case.ties or not case.num_tokens:
            return
        x = self.inputs(case)[0]
        leaves = leaves_of(layer, x=x)
        if layer.router.straight_through:  # weights carry what their values do not follow
            leaves = {n: p for n, p in leaves.items() if n != "x" and not n.startswith("router.")}
        check_gradients(lambda: self.outcome(case, layer, x), leaves, case)

    def inference(self, case: Case) -> None:
        layer = self.build(case)
        x, mask, ids = self.inputs(case)
        some = slice(0, 1)
        lone = x[some, some], None if mask is None else mask[some, some], ids[some, some]
        for given in ((x, mask, ids), lone):
            y, _ = self.run(case, layer, *given)
            with torch.no_grad():
                found, _ = self.run(case, layer, *given)
            close(found, y.detach(), "y without a gradient", atol=1e-8)

    def dtypes(self, case: Case) -> None:
        x = self.inputs(case)[0]
        for dtype in DTYPES:
            narrow = self.build(case).to(dtype)
            sides: list[Side] = []
            for layer in (narrow, copy.deepcopy(narrow).double()):
                given = x.to(dtype).to(torch.float64 if sides else dtype)
                leaves = leaves_of(layer, x=given)
                sides.append((self.outcome(case, layer, given), leaves))
            (y,) = sides[0][0].values
            assert y.dtype == dtype, f"{dtype} came out as {y.dtype}"
            check_narrow(sides[0], sides[1], dtype, case)

    def copies(self, case: Case) -> None:
        x = self.inputs(case)[0]
        check_copies(self.build, lambda layer: self.outcome(case, layer, x).values, case)

    def inputs(self, case: Case) -> tuple[Tensor, Tensor | None, Tensor]:
        """x (B, L, D) float64, mask (B, L) or None, token ids (B, L)."""
        tokens = case.tokens(torch.float64)
        shape = (case.groups, case.group_size)
        mask = None if tokens.real is None else tokens.real.view(shape)
        assert tokens.ids is not None
        return tokens.x.view(*shape, D_MODEL), mask, tokens.ids.view(shape)

    def run(
        self, case: Case, layer: MoE, x: Tensor, mask: Tensor | None, ids: Tensor
    ) -> tuple[Tensor, Assignment | None]:
        with seeded(case.seed + 1):
            y, routing = layer(x, mask=mask, token_ids=ids)
        found = routing.assignment
        return y, found if isinstance(found, Assignment) else None

    def plain_loop(self, case: Case) -> None:
        layer = self.build(case)
        x, mask, ids = self.inputs(case)
        y, a = self.run(case, layer, x, mask, ids)
        if a is None:
            return
        flat = x.reshape(-1, D_MODEL)
        expected = torch.zeros_like(flat)
        for token, expert, weight, kept in zip(a.token, a.expert, a.weight, a.kept, strict=True):
            if kept:
                counts = token.new_zeros(layer.experts.num_experts)
                counts[expert] = 1
                row = layer.experts(flat[token : token + 1], counts)
                expected[token] += (weight * row[0]).detach()
        if layer.shared is None:
            close(y.detach().reshape(-1, D_MODEL), expected, "y against the loop", atol=1e-8)

    def padding(self, case: Case) -> None:
        layer = self.build(case)
        x, mask, ids = self.inputs(case)
        if mask is None or layer.capacity.counts_padding:
            return
        dirty = torch.where(mask[:, :, None], x, float("nan"))
        clean, _ = self.run(case, layer, x, mask, ids)
        found, _ = self.run(case, layer, dirty, mask, ids)
        if x.is_cpu:
            same([found], [clean], "NaN in padding changed y")
        else:  # where sums may have any order
            close(found, clean, "NaN in padding changed y", atol=1e-8)
        zero = found[~mask]
        same([zero], [torch.zeros_like(zero)], "padding in y")

    def input_unchanged(self, case: Case) -> None:
        layer = self.build(case)
        x, mask, ids = self.inputs(case)
        before = x.clone()
        y, _ = self.run(case, layer, x, mask, ids)
        same([x], [before], "x after the layer")
        assert (y.shape, y.dtype) == (x.shape, x.dtype), f"y is {tuple(y.shape)} {y.dtype}"

    def dropped(self, case: Case) -> None:
        layer = self.build(case)
        x, mask, ids = self.inputs(case)
        if layer.shared is not None or layer.router.soft:
            return
        x = x.clone().requires_grad_()
        y, a = self.run(case, layer, x, mask, ids)
        assert a is not None
        lost = torch.ones(a.num_tokens, dtype=torch.bool, device=a.token.device)
        lost[a.token[a.kept]] = False
        rows = y.reshape(-1, D_MODEL)[lost[: y.numel() // D_MODEL]]
        same([rows], [torch.zeros_like(rows)], "tokens without a kept pair")
        if rows.numel() and rows.requires_grad:
            (gradient,) = torch.autograd.grad(rows.sum(), x, allow_unused=True)
            none = gradient is None or bool((gradient == 0).all())
            assert none, "a dropped token passes a gradient"

    def prefill(self, case: Case) -> None:
        layer = self.build(case).eval()
        x, _, ids = self.inputs(case)
        if not layer.router.deterministic or layer.router.needs_token_ids and case.num_tokens == 0:
            return
        whole, a = self.run(case, layer, x, None, ids)
        if a is None or not bool(a.kept.all()) and layer.capacity.may_drop:
            return  # a limit that binds sees other queues; the policy's page says so
        for row in range(case.groups):
            for place in range(case.group_size):
                here = slice(place, place + 1)
                alone, _ = self.run(
                    case, layer, x[row : row + 1, here], None, ids[row : row + 1, here]
                )
                close(alone[0, 0], whole[row, place], f"token {place} alone", atol=1e-8)
