"""Tokens through stacked networks: the strips equal a plain loop, whatever the networks are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moezoo.errors import RoutingError
from moezoo.functional import expert_strips
from moezoo.functional import routed_mlp as module
from moezoo.functional.expert_strips import planned
from moezoo.functional.routed_mlp import Networks, routed_mlp

WIDTH, HIDDEN, OUT = 5, 3, 4


def gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def drawn(seed: int, experts: int, *, biased: bool, turned: bool) -> Networks:
    """Networks of float64 with everything that may be there."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    up = leaf(experts, WIDTH, 2 * HIDDEN) if turned else leaf(experts, 2 * HIDDEN, WIDTH)
    down = leaf(experts, HIDDEN, OUT) if turned else leaf(experts, OUT, HIDDEN)
    made = Networks(up, down, gated, pure=True)
    if biased:
        made = replace(made, up_bias=leaf(experts, 2 * HIDDEN), down_bias=leaf(experts, OUT))
    return made


def seen(networks: Networks, *, turned: bool) -> Networks:
    """The same by (E, outputs, inputs)."""
    if not turned:
        return networks
    up, down = networks.up.transpose(1, 2), networks.down.transpose(1, 2)
    return replace(networks, up=up, down=down)


def tokens(seed: int, number: int, experts: int, choices: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, choices that may repeat and may be of nobody, weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, WIDTH, generator=generator, dtype=torch.float64)
    chosen = torch.randint(0, experts + 1, (number, choices), generator=generator)
    weights = torch.randn(number, choices, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), chosen, weights.requires_grad_()


def plain(x: Tensor, expert: Tensor, weight: Tensor, networks: Networks) -> Tensor:
    rows = []
    for t in range(expert.shape[0]):
        total = x.new_zeros(OUT)
        for k in range(expert.shape[1]):
            e = int(expert[t, k])
            if e < networks.up.shape[0]:
                h = networks.up[e] @ x[t]
                h = h if networks.up_bias is None else h + networks.up_bias[e]
                y = networks.down[e] @ networks.function(h)
                y = y if networks.down_bias is None else y + networks.down_bias[e]
                total = total + weight[t, k] * y
        rows.append(total)
    return torch.stack(rows)


@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 40, 10**6]),
    st.sampled_from([0, 64]),
)
def test_values_and_gradients_equal_a_plain_loop(
    seed: int, number: int, experts: int, choices: int, biased: bool, turned: bool, strip: int,
    few: int,
) -> None:  # fmt: skip
    networks = drawn(seed, experts, biased=biased, turned=turned)
    given = tokens(seed, number, experts, choices)
    x, _, weight = given
    leaves = [x, weight, *(t for t in networks.tensors if t is not None)]
    expected = plain(*given, seen(networks, turned=turned))
    toward = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    if not expected.requires_grad:  # no token has an expert
        expected = expected + 0.0 * sum(leaf.sum() for leaf in leaves)
    wanted = torch.autograd.grad(expected, leaves, toward, materialize_grads=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_strips, "_STRIP", strip)
        patch.setattr(expert_strips, "_FEW", few)
        found = routed_mlp(*given, seen(networks, turned=turned))
        with torch.no_grad():
            alone = routed_mlp(*given, seen(networks, turned=turned))
        grads = torch.autograd.grad(found, leaves, toward)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(alone, expected.detach())
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("number", [1, 3, 40])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_is_rounded_as_its_own(
    dtype: torch.dtype, threads: int, number: int, biased: bool, turned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(number)

    def leaf(*shape: int) -> Tensor:
        made = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.to(dtype).double().requires_grad_()

    up, down = (leaf(9, 8, 32), leaf(9, 16, 24)) if turned else (leaf(9, 32, 8), leaf(9, 24, 16))
    biases = (leaf(9, 32), leaf(9, 24)) if biased else ()
    weight = leaf(number, 6)
    chosen = torch.rand(number, 10, generator=generator).topk(6).indices  # 9 is nobody's
    leaves = [leaf(number, 8), weight, up, down, *biases]

    def made(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        networks = seen(Networks(up, down, gated, *biases, pure=True), turned=turned)
        return routed_mlp(x, chosen, weight, networks)

    own = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves]
    exact, found = made(*leaves), made(*own)
    assert found.dtype == dtype
    toward = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view_as(exact)
    wanted = torch.autograd.grad(exact, leaves, toward)
    grads = torch.autograd.grad(found, own, toward.to(dtype))
    with torch.no_grad():
        alone = made(*own)
    slack = 40 * torch.finfo(dtype).eps
    for one, other in [(found, exact), (alone, exact), *zip(grads, wanted, strict=True)]:
        torch.testing.assert_close(
            one.double(), other, rtol=slack, atol=slack * float(other.detach().abs().max())
        )


@given(st.data())
def test_a_plan_gives_every_pair_a_row_of_its_expert(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 12))
    choices = data.draw(st.integers(1, 3))
    drawn = data.draw(st.lists(st.integers(0, number), max_size=80))
    drawn = drawn[: len(drawn) // choices * choices]
    chosen = torch.tensor(drawn, dtype=torch.int64).view(-1, choices)
    threads = data.draw(st.integers(1, 4))
    shared = data.draw(st.sampled_from([0, 4, 8, 16]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(expert_strips, "_FEW", data.draw(st.sampled_from([0, 1000])))
        patch.setattr(expert_strips, "_STRIP", data.draw(st.sampled_from([1, 24, 10**6])))
        plan = planned(chosen, torch.Size((number, 2, 1)), shared)
    flat = chosen.reshape(-1)
    assert torch.equal(plan.pair[plan.row.reshape(-1)], torch.arange(flat.numel()))
    assert torch.equal(plan.token, plan.pair // choices)
    assert plan.hit == sorted({int(e) for e in flat if e < number})
    assert (flat[plan.pair[plan.used :]] == number).all()
    assert plan.rows == len(plan.pair)
    assert set(plan.spares) == set(range(plan.rows)) - set(plan.row.reshape(-1).tolist())
    end = 0
    for strip in plan.strips:
        assert strip.rows == slice(strip.batches[0].rows.start, strip.batches[-1].rows.stop)
        alone = all(batch.size == 1 for batch in strip.batches)
        assert (strip.ends is not None) is alone
        if strip.ends is not None:
            own = flat[plan.pair[strip.rows]]
            experts = torch.arange(number)[strip.experts]
            assert strip.ends.tolist() == [int((own <= e).sum()) for e in experts]
        for batch in strip.batches:
            assert batch.rows.start == end
            end = batch.rows.stop
            experts = range(number)[batch.experts]
            assert len(experts) == batch.size
            if batch.size > 1:
                assert batch.size % threads == 0 and batch.size >= 2
                assert (end - batch.rows.start) // batch.size <= shared
            each = (end - batch.rows.start) // batch.size
            owners = torch.tensor(experts).repeat_interleave(each)
            assert torch.equal(flat[plan.pair[batch.rows]], owners)
    assert end == plan.used


@pytest.mark.parametrize("number", [1, 3, 200])
def test_numbers_below_0_are_refused(number: int) -> None:
    x, expert, weight = tokens(0, number, 3, 2)
    expert[0, 1] = -1
    with pytest.raises(RoutingError, match="experts are numbered from 0; found -1"):
        routed_mlp(x, expert, weight, drawn(0, 3, biased=False, turned=False))


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_differentiated_again(biased: bool) -> None:
    networks = drawn(0, 3, biased=biased, turned=False)
    x, expert, weight = tokens(1, 4, 3, 2)

    def made(x: Tensor, weight: Tensor, *tensors: Tensor) -> Tensor:
        up, down, *biases = tensors
        own = Networks(up, down, gated, *biases, pure=True)
        return routed_mlp(x, expert, weight, own)

    leaves = [x, weight, *(t for t in networks.tensors if t is not None)]
    assert torch.autograd.gradcheck(made, leaves)
    assert torch.autograd.gradgradcheck(made, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", range(6))
def test_a_gradient_alone_is_that_of_all(wanted: int) -> None:
    networks = drawn(0, 3, biased=True, turned=False)
    x, expert, weight = tokens(1, 6, 3, 2)
    leaves = [x, weight, *(t for t in networks.tensors if t is not None)]
    every = torch.autograd.grad(routed_mlp(x, expert, weight, networks).sum(), leaves)
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number == wanted)
    alone = torch.autograd.grad(routed_mlp(x, expert, weight, networks).sum(), leaves[wanted])
    torch.testing.assert_close(alone[0], every[wanted])


def test_strips_are_taken_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = drawn(0, 3, biased=True, turned=False)
    given = tokens(1, 6, 3, 2)

    def composed(*_: object) -> Tensor:
        raise AssertionError("composed")

    monkeypatch.setattr(module, "_composed", composed)
    routed_mlp(*given, networks)
    for other in (replace(networks, pure=False), replace(networks, after=torch.relu)):
        with pytest.raises(AssertionError, match="composed"):
            routed_mlp(*given, other)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="composed"):
        routed_mlp(*given, networks)


def test_results_are_changed_before_they_are_weighed() -> None:
    networks = drawn(0, 3, biased=True, turned=False)
    x, expert, weight = tokens(1, 6, 3, 1)
    once = routed_mlp(x, expert, torch.ones_like(weight), networks)
    after = routed_mlp(x, expert, weight, replace(networks, after=torch.tanh))
    torch.testing.assert_close(after, weight * once.tanh())


def test_no_tokens_give_no_rows() -> None:
    networks = drawn(0, 3, biased=True, turned=False)
    x, expert, weight = tokens(1, 1, 3, 2)
    y = routed_mlp(x[:0], expert[:0], weight[:0], networks)
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert not networks.up.grad.any()
