"""Experts on several ranks: what one process computes on the joint batch, to the last bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import moezoo
from moezoo import dispatchers
from moezoo.errors import ConfigError, RegistryError
from moezoo.experts import StackedExperts
from moezoo.parallel import clip_grad_norm, expert_parallel, mean_gradients, mesh, plan, traffic
from tests.parallel.ranks import (
    Batch,
    Claims,
    Ranks,
    apart,
    batch,
    gradients_agree,
    lively,
    meshes,
    started,
)

claims = Claims()
pytestmark = pytest.mark.dist
EXACT = 2e-14

CASES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity by sequence": {
        "capacity": {"name": "first_come", "factor": 0.7},
        "group": "sequence",
    },
    "top-2": {"router": {"name": "top_k", "k": 2}},
    "hash": {"router": "hash"},
    "streamed": {"router": "streamed_switch"},
    "soft by sequence": {"router": "soft", "group": "sequence", "allow_noncausal": True},
    "gated and untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "MoE++": {"num_experts": 6, "experts": {"name": "zero", "zero": 1, "copy": 1, "constant": 0}},
    "shared branch": {"shared_expert": {"d_ff": 8, "gated": True}},
}
# Losses of a batch have a test file of their own; capacity by batch is by rank.
NO_LOSSES: dict[str, Any] = {"router_losses": {}, "capacity": "dropless"}


def alone(given: Batch, **overrides: Any) -> tuple[nn.Module, Any]:
    model = lively(**{**NO_LOSSES, **overrides})
    output = model(**given.given())
    output.loss.backward()
    return model, output


def together(
    ranks: Ranks, grid: Any, given: Batch, *, dispatcher: str = "alltoall", **overrides: Any
) -> tuple[nn.Module, Any]:
    model = expert_parallel(lively(**{**NO_LOSSES, **overrides}), grid, dispatcher=dispatcher)
    output = model(**given.of(ranks.rank, ranks.world).given())
    output.loss.backward()
    mean_gradients(model, grid)
    return model, output


def agree(ranks: Ranks, grid: Any, given: Batch, **overrides: Any) -> None:
    dispatcher = overrides.pop("dispatcher", "alltoall")
    reference, whole = alone(given, **overrides)
    model, output = together(ranks, grid, given, dispatcher=dispatcher, **overrides)
    rows = slice(ranks.rank * output.logits.shape[0], (ranks.rank + 1) * output.logits.shape[0])
    assert apart(output.logits, whole.logits[rows]) < EXACT
    gradients_agree(model, reference, within=EXACT)


@claims.over(2, 4)
def values_and_gradients_are_those_of_one_process(ranks: Ranks) -> None:
    for grid in meshes(ranks):
        for name, overrides in CASES.items():
            if overrides.get("num_experts", 4) == 6 and grid["ep"].size() == 4:
                overrides = {**overrides, "num_experts": 8, "experts": {"name": "zero", "zero": 2}}
            try:
                agree(ranks, grid, batch(padded=name in ("top-2", "dropless")), **overrides)
            except AssertionError as error:
                raise AssertionError(f"{name}, {grid}: {error}") from error


@claims.over(2, 4)
def so_are_those_of_gathered_rows(ranks: Ranks) -> None:
    for grid in meshes(ranks):
        agree(ranks, grid, batch(), dispatcher="allgather")


@claims.over(2)
def rows_may_be_unequal_over_ranks_and_none(ranks: Ranks) -> None:
    grid = mesh(2, device="cpu")
    torch.manual_seed(0)
    layer = moezoo.SparseMLP(8, 16, 4, capacity="dropless").double()
    for dispatcher in ("alltoall", "allgather"):
        spread = expert_parallel(copy.deepcopy(layer), grid, dispatcher=dispatcher)
        for sizes in ((5, 2), (3, 0), (0, 0)):
            x = torch.randn(sum(sizes), 8, dtype=torch.float64, requires_grad=True)
            whole = layer(x)
            whole.square().sum().backward()
            mine = x.detach()[sizes[0] * ranks.rank :][: sizes[ranks.rank]].requires_grad_()
            ours = spread(mine)
            assert apart(ours, whole[sizes[0] * ranks.rank :][: sizes[ranks.rank]]) < EXACT
            (2 * ours.square().sum()).backward()  # twice the mean of both is the sum
            mean_gradients(spread, grid)
            gradients_agree(spread, layer, within=EXACT)
            layer.zero_grad()
            spread.zero_grad()


@claims.over(2, 4)
def all_tokens_may_go_to_one_expert(ranks: Ranks) -> None:
    layer = moezoo.SparseMLP(16, 24, 4, router="hash", capacity="dropless", vocab_size=61).double()
    layer.moe.router.table.fill_(2)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3 * ranks.world, 16, generator=source, dtype=torch.float64)
    ids = torch.arange(x.shape[0])
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=source)
    layer(x, token_ids=ids).square().mean().backward()
    mine = slice(3 * ranks.rank, 3 * ranks.rank + 3)
    for grid in meshes(ranks):
        spread = expert_parallel(copy.deepcopy(layer), grid)
        spread.zero_grad()
        spread(x[mine], token_ids=ids[mine]).square().mean().backward()
        mean_gradients(spread, grid)
        gradients_agree(spread, layer, within=EXACT)


@claims.over(2)
def a_rank_whose_tokens_are_all_padding_takes_part(ranks: Ranks) -> None:
    given, grid = batch(), mesh(2, device="cpu")
    given.mask[4:] = 0
    agree(ranks, grid, given)


@claims.over(2)
def checkpointing_recomputes_the_same(ranks: Ranks) -> None:
    given, grid = batch(), mesh(2, device="cpu")
    reference, _ = alone(given)
    model = expert_parallel(lively(**NO_LOSSES), grid)
    model.gradient_checkpointing()
    model(**given.of(ranks.rank, 2).given()).loss.backward()
    mean_gradients(model, grid)
    gradients_agree(model, reference, within=EXACT)


@claims.over(2, 4)
def second_derivatives_are_scaled_once(ranks: Ranks) -> None:
    """The gradient of a penalty on the input's gradient, the mean over ranks."""
    torch.manual_seed(0)
    layer = moezoo.SparseMLP(8, 16, 4, capacity="dropless", activation="gelu").double()
    x = torch.randn(4 * ranks.world, 8, dtype=torch.float64)

    def penalty(part: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone().requires_grad_()
        (slope,) = torch.autograd.grad(part(rows).square().sum(), rows, create_graph=True)
        return slope.square().sum()

    (penalty(layer, x) / ranks.world).backward()
    for grid in meshes(ranks):
        spread = expert_parallel(copy.deepcopy(layer), grid)
        spread.zero_grad()
        penalty(spread, x[4 * ranks.rank :][:4]).backward()
        mean_gradients(spread, grid)
        gradients_agree(spread, layer, within=1e-12)


@claims.over(2)
def sums_are_means_times_the_ranks(ranks: Ranks) -> None:
    grid, given = mesh(2, device="cpu"), batch()
    mean, _ = together(ranks, grid, given)
    total = expert_parallel(lively(**NO_LOSSES), grid, gradients="sum")
    total(**given.of(ranks.rank, 2).given()).loss.backward()
    named = dict(mean.named_parameters())
    for name, parameter in total.named_parameters():
        if ".experts." in name:
            assert torch.equal(parameter.grad.to_local(), 2 * named[name].grad.to_local())
    with pytest.raises(ConfigError, match="are sums"):
        mean_gradients(total, grid)


@claims.over(1)
def a_mesh_of_one_rank_changes_no_bit(ranks: Ranks) -> None:
    given, grid = batch(), mesh(device="cpu")
    reference, whole = alone(given)
    model, output = together(ranks, grid, given)
    assert torch.equal(output.logits, whole.logits)
    named = dict(reference.named_parameters())
    assert all(torch.equal(p.grad, named[name].grad) for name, p in model.named_parameters())
    norms = [clip_grad_norm(m, 0.5) for m in (model, reference)]
    assert torch.equal(*norms)
    assert all(torch.equal(p.grad, named[name].grad) for name, p in model.named_parameters())


@claims.over(2, 4)
def the_wire_carries_rows_once_there_and_back_and_little_else(ranks: Ranks) -> None:
    given = batch().of(ranks.rank, ranks.world)
    for grid in meshes(ranks):
        model = expert_parallel(lively(**NO_LOSSES), grid)
        with traffic() as sent:
            output = model(**given.given())
        ep, place = grid["ep"].size(), grid["ep"].get_local_rank()
        away = sum(
            int((routing.assignment.expert // (4 // ep) != place).sum())
            for routing in output.routing
        )
        arriving = torch.tensor(away)
        dist.all_reduce(arriving, group=grid["ep"].get_group())
        whole = torch.tensor(sent.rows)
        dist.all_reduce(whole, group=grid["ep"].get_group())
        row = 16 * 8  # width, bytes
        assert int(whole) == 2 * int(arriving) * row  # there and back
        assert sent.counts == len(output.routing) * (ep - 1) * (4 // ep) * 8
        assert sent.calls == 3 * len(output.routing)
        with traffic() as back:
            output.loss.backward()
        assert (back.rows, back.counts) == (sent.rows, 0)


@claims.over(2)
def each_rank_holds_its_experts_and_no_more(ranks: Ranks) -> None:
    model, whole = lively(), dict(lively().named_parameters())
    expert_parallel(model, mesh(2, device="cpu"))
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            continue
        held = parameter.to_local()
        assert torch.equal(held, whole[name][2 * ranks.rank :][:2])
        assert held.untyped_storage().nbytes() == held.nbytes
        assert tuple(parameter.shape) == tuple(whole[name].shape)


@claims.over(2)
def a_deep_copy_has_gradients_of_its_own(ranks: Ranks) -> None:
    given, grid = batch().of(ranks.rank, 2), mesh(2, device="cpu")
    model = expert_parallel(lively(), grid)
    twin = copy.deepcopy(model)
    twin(**given.given()).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    assert torch.equal(model(**given.given()).loss, twin(**given.given()).loss)


@claims.over(2)
def a_compiled_model_computes_the_same(ranks: Ranks) -> None:
    given, grid = batch(), mesh(2, device="cpu")
    reference, whole = alone(given)
    model = expert_parallel(lively(**NO_LOSSES), grid)
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks:
            block.compile(backend="aot_eager")
    output = model(**given.of(ranks.rank, 2).given())
    output.loss.backward()
    mean_gradients(model, grid)
    gradients_agree(model, reference, within=1e-12)


@claims.over(2)
def half_precision_weighs_on_the_owners_side(ranks: Ranks) -> None:
    given = batch().of(ranks.rank, 2)
    alone_ = lively(torch.float16, **NO_LOSSES)
    model = expert_parallel(copy.deepcopy(alone_), mesh(2, device="cpu"))
    with torch.no_grad():
        ours, theirs = model(**given.given()).logits, alone_(**given.given()).logits
    assert torch.equal(ours, theirs)


@claims.over(2)
def decoding_one_token_calls_the_experts_of_all_ranks(ranks: Ranks) -> None:
    grid = mesh(2, device="cpu")
    layer = moezoo.SparseMLP(8, 16, 4).double().eval()
    dist.broadcast(torch.cat([p.detach().flatten() for p in layer.parameters()]), 0)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    spread = expert_parallel(copy.deepcopy(layer), grid)
    with torch.no_grad():
        for step in range(4):
            x = torch.randn(1, 8, dtype=torch.float64)
            assert apart(spread(x), layer(x)) < EXACT, step


@claims.over(2)
def what_cannot_be_divided_is_refused_by_name(ranks: Ranks) -> None:
    grid = mesh(2, device="cpu")
    for experts in ("lora", "modules"):
        layer = moezoo.SparseMLP(8, 16, 4, experts=experts)
        with pytest.raises(ConfigError, match="moe.experts: the experts of .* cannot be divided"):
            expert_parallel(layer, grid)
    with pytest.raises(ConfigError, match="expected a multiple of 2, found 3"):
        expert_parallel(moezoo.SparseMLP(8, 16, 3), grid)
    model = expert_parallel(lively(), grid)
    with pytest.raises(ConfigError, match="not sharded over ranks"):
        expert_parallel(model, grid)
    with pytest.raises(ConfigError, match="do not follow torch.func"):
        layer = expert_parallel(moezoo.SparseMLP(8, 16, 4), grid)
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(3, 8))
    with pytest.raises(ConfigError, match="bad ep; expected a divisor of 2 ranks, found 3"):
        mesh(3, device="cpu")
    with pytest.raises(ConfigError, match="not a mesh of data and experts"):
        expert_parallel(lively(), grid["ep"])


@claims.over(2)
def torch_parallelizes_by_the_plan_and_sends_the_first_ranks_weights(ranks: Ranks) -> None:
    grid, first = mesh(2, device="cpu"), lively()
    model = lively() if ranks.rank == 0 else moezoo.build(first.config, seed=9).double()
    parallelize_module(model, grid["ep"], plan(model))
    for name, stack in first.named_parameters():
        if ".experts." in name:
            held = model.get_parameter(name).to_local()
            assert torch.equal(held, stack[2 * ranks.rank :][:2])


@claims.over(2)
def a_dispatcher_of_ones_own_is_used_by_its_name(ranks: Ranks) -> None:
    @dispatchers.register("counted", override=True)
    class Counted(dispatchers.AllToAllDispatcher):
        calls = 0

        def exchange(self, *given: Any) -> torch.Tensor:
            Counted.calls += 1
            return super().exchange(*given)

    grid, layer = mesh(2, device="cpu"), moezoo.SparseMLP(8, 16, 4)
    expert_parallel(layer, grid, dispatcher="counted")(torch.randn(3, 8))
    assert Counted.calls == 1 and "counted" in repr(layer.moe.experts.dispatcher).lower()
    with pytest.raises(RegistryError, match="unknown dispatcher 'alltoal'. Did you mean"):
        expert_parallel(moezoo.SparseMLP(8, 16, 4), grid, dispatcher="alltoal")
    with pytest.raises(ConfigError, match="'mean' or 'sum', found 'min'"):
        expert_parallel(moezoo.SparseMLP(8, 16, 4), grid, gradients="min")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], str]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    yield started(__name__, folder)


@pytest.mark.parametrize(("world", "claim"), claims.names(), ids=lambda x: str(x))
def test_over_ranks(world: int, claim: str, outcomes: dict[tuple[int, str], str]) -> None:
    assert not outcomes[world, claim], outcomes[world, claim]


def test_a_plan_names_every_stack_and_a_dense_model_has_none() -> None:
    model = lively(encoder_sparse_layers="all")
    named = plan(model)
    stacks = [name for name, m in model.named_modules() if isinstance(m, StackedExperts)]
    assert list(named) == stacks
    with pytest.raises(ConfigError, match="has no experts to divide"):
        plan(moezoo.build("t5-small", device="meta"))


def test_a_mesh_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="no process group"):
        mesh(2)
