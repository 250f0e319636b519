"""What every router of the package must do, whatever it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from moezoo import routers
from moezoo.records import Routing, SoftAssignment, Tokens
from moezoo.routers import Router
from tests.routers.batches import VOCABULARY, WIDTH, batch

NAMES = [n for n in routers.names() if routers.registry.get(n).__module__.startswith("moezoo.")]
every_router = pytest.mark.parametrize("name", NAMES)


def build(name: str, num_experts: int = 4, **options: object) -> Router:
    torch.manual_seed(0)
    parameters = routers.registry.get(name).__init__.__annotations__
    if "k" in parameters and num_experts == 1:
        options["k"] = 1
    sizes = {"d_model": WIDTH, "num_experts": num_experts, "vocab_size": VOCABULARY}
    return routers.build({"name": name, **options}, **sizes)


def values(routing: Routing) -> list[Tensor]:
    """Everything that a routing says, as tensors."""
    a = routing.assignment
    if isinstance(a, SoftAssignment):
        return [a.dispatch, a.combine]
    kept = a.kept
    return [a.kept, a.token[kept], a.expert[kept], a.weight, *routing.losses.values()]


@every_router
@pytest.mark.parametrize("num_experts", [1, 2, 8])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_tokens", "group_size"), [(0, 0), (1, 0), (12, 4), (12, 0)])
@pytest.mark.parametrize("padded", [True, False])
def test_records_keep_their_invariants_and_promises(
    name: str, num_experts: int, training: bool, num_tokens: int, group_size: int, padded: bool
) -> None:
    router = build(name, num_experts).train(training)
    tokens = batch(num_tokens, group_size=group_size, padded=padded)
    before = tokens.x.clone()
    routing = router(tokens)
    assert torch.equal(tokens.x, before)
    a = routing.assignment.check(tokens.real)
    if not isinstance(a, SoftAssignment) and router.choices:
        assert a.num_pairs == num_tokens * router.choices == num_tokens * a.choices
    assert (routing.logits is not None) == router.has_logits
    assert (routing.probs is not None) == router.has_probs
    if routing.probs is not None:
        assert torch.allclose(routing.probs.sum(-1), torch.ones(num_tokens))
    assert set(routing.losses) == router.own_losses
    assert all(loss.dim() == 0 and torch.isfinite(loss) for loss in routing.losses.values())


@every_router
def test_contents_of_padding_never_matter(name: str) -> None:
    router = build(name).train()
    tokens = batch(12, group_size=4, padded=True)
    assert tokens.real is not None
    x = torch.where(tokens.real[:, None], tokens.x, float("nan"))
    results = []
    for content in (tokens.x, x):
        torch.manual_seed(1)
        results.append(values(router(Tokens(content, tokens.ids, tokens.real, 4))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_router
def test_gate_is_float32_under_autocast_and_in_bfloat16_models(name: str) -> None:
    router, tokens = build(name).bfloat16(), batch(12, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(tokens)
    a = routing.assignment
    assert (a.dispatch if isinstance(a, SoftAssignment) else a.weight).dtype == torch.float32
    for scores in (routing.logits, routing.probs):
        assert scores is None or scores.dtype == torch.float32
    assert all(b.dtype in (torch.float32, torch.int64) for b in router.buffers())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("hash", "random")])
def test_float64_gradients_are_right(name: str) -> None:
    router, tokens = build(name).double().eval(), batch(5, dtype=torch.float64)

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        routing = router(Tokens(x, tokens.ids))
        a = routing.assignment
        if isinstance(a, SoftAssignment):
            return a.dispatch, a.combine
        return (a.weight, *routing.losses.values())

    assert torch.autograd.gradcheck(outputs, (tokens.x.requires_grad_(),))


@every_router
def test_huge_inputs_give_valid_records(name: str) -> None:
    tokens = batch(8)
    huge = Tokens(tokens.x * 1e25, tokens.ids)
    if name == "relu":  # its gates are the logits themselves
        huge = Tokens(tokens.x * 1e10, tokens.ids)
    build(name).train()(huge).assignment.check()


@every_router
def test_adapting_to_nothing_and_to_padding_is_harmless(name: str) -> None:
    router = build(name).train()
    before = copy.deepcopy(router.state_dict())
    padding = Tokens(torch.randn(4, WIDTH), torch.zeros(4).long(), torch.zeros(4).bool())
    router.adapt([])
    router.adapt([router(padding), router(batch(0))])
    assert all(torch.equal(router.state_dict()[key], value) for key, value in before.items())


@every_router
def test_routers_pickle_copy_and_build_without_memory(name: str) -> None:
    router = build(name).eval()
    tokens = batch(6)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        pairs_of_values = zip(values(router(tokens)), values(twin(tokens)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs_of_values)
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in build(name).state_dict().values())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "base"])  # its assignment is on the CPU
def test_routers_compile_into_one_graph(name: str) -> None:
    options = {"max_choices": 2} if name in ("relu", "expert_threshold") else {}
    router, tokens = build(name, **options).eval(), batch(12)

    def outputs(x: Tensor) -> list[Tensor]:
        routing = router(Tokens(x, tokens.ids, group_size=4))
        a = routing.assignment
        return [a.combine] if isinstance(a, SoftAssignment) else [a.expert, a.kept, a.weight]

    torch._dynamo.reset()
    compiled = torch.compile(outputs, backend="eager", fullgraph=True)
    for eager, graph in zip(outputs(tokens.x), compiled(tokens.x), strict=True):
        if not eager.is_floating_point():
            assert torch.equal(eager, graph), "who goes where"
            continue
        # Eager and graph may add up the D = 6 products of a score in another order: each sum is
        # then off by D eps = 7e-7 of its terms, which are of order one, and so is a weight.
        torch.testing.assert_close(eager, graph, rtol=1.3e-6, atol=1e-5)
