"""Every module with state keeps its buffers' steps in any dtype, and can be drawn anew."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo import MoezooError
from moezoo.building import TASKS
from moezoo.component import Component, redraw
from moezoo.experts import FeedForward, SharedExpert, StackedExperts
from moezoo.records import Tokens
from moezoo.routers import Router
from tests.models.tiny import TINY

D_MODEL, EXPERTS, VOCABULARY = 6, 4, 24
SIZES: dict[str, Any] = {"d_model": D_MODEL, "num_experts": EXPERTS}
HALVES = (torch.bfloat16, torch.float16)
GARBAGE = 77


def parts() -> dict[str, Callable[[], nn.Module]]:
    """A maker for every registered component, for parts that are built alone, and for layers."""
    made: dict[str, Callable[[], nn.Module]] = {}
    for name in moezoo.routers.names():
        made[f"router {name}"] = lambda name=name: moezoo.routers.build(
            name, vocab_size=VOCABULARY, **SIZES
        )
        made[f"layer {name}"] = lambda name=name: moezoo.SparseMLP(
            D_MODEL, 8, EXPERTS, router=name, vocab_size=VOCABULARY, shared={"gated": True}
        )
    for name in moezoo.capacity.names():
        made[f"policy {name}"] = lambda name=name: moezoo.capacity.build(name)
    for name in moezoo.losses.names():
        made[f"loss {name}"] = lambda name=name: moezoo.losses.build(name)
    for name in moezoo.experts.names():
        for activation in ("relu", "gated-gelu"):
            made[f"experts {name} {activation}"] = lambda name=name, activation=activation: (
                moezoo.experts.build(name, d_ff=8, activation=activation, **SIZES)
            )
    made["a switch router with a bias"] = lambda: moezoo.routers.build(
        {"name": "switch", "bias": True}, **SIZES
    )
    made["a table by frequency"] = lambda: moezoo.routers.build(
        {"name": "hash", "table": "frequency", "frequencies": list(range(VOCABULARY))},
        vocab_size=VOCABULARY, **SIZES,
    )  # fmt: skip
    made["a feed-forward network"] = lambda: FeedForward(D_MODEL, 8)
    made["a gated shared expert"] = lambda: SharedExpert(D_MODEL, 8, gated=True)
    return made


PARTS = parts()
every_part = pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
ADAPTIVE = [n for n in moezoo.routers.names() if "adapt" in vars(moezoo.routers.registry.get(n))]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def emptied(module: nn.Module) -> nn.Module:
    """The module on the CPU after "meta", all of it garbage."""
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)
    return module


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_wide(module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), f"{name} is {buffer.dtype}"


@every_part
def test_what_is_built_on_meta_and_reset_is_what_the_constructor_makes(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(5)
    direct = make()
    with torch.device("meta"):
        late: Any = make()
    emptied(late)
    torch.manual_seed(5)
    late.reset_parameters()
    assert_same_state(late, direct)


@every_part
def test_every_part_survives_pickling(make: Callable[[], nn.Module]) -> None:
    part = make()
    twin = pickle.loads(pickle.dumps(part))
    assert_same_state(twin, part)
    twin.reset_parameters()


@every_part
def test_tools_that_reset_module_by_module_draw_the_same_weights(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(5)
    direct = make().state_dict()
    with torch.device("meta"):
        late: Any = make()
    emptied(late)
    for module in late.modules():  # as FSDP does
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    for name, tensor in late.state_dict().items():
        assert bool(torch.isfinite(tensor).all()), name
        constant = direct[name].numel() == 1 or not direct[name].is_floating_point()
        if constant or direct[name].unique().numel() == 1:
            assert torch.equal(tensor, direct[name]), name
        elif tensor.numel() >= 24:
            ratio = float(tensor.std() / direct[name].std())
            assert 0.4 < ratio < 2.5, f"{name}: standard deviations differ by {ratio}"


@pytest.mark.parametrize("router", moezoo.routers.names())
@pytest.mark.parametrize("task", TASKS)
def test_a_model_emptied_and_reset_is_the_one_built_with_the_seed(router: str, task: str) -> None:
    overrides: Any = {"router": router, "allow_noncausal": True, "shared_expert": {"gated": True}}
    direct = moezoo.build(TINY, task=task, seed=3, **overrides)
    late: Any = emptied(moezoo.build(TINY, task=task, device="meta", **overrides))
    torch.manual_seed(3)
    late.reset_parameters()
    assert_same_state(late, direct)
    assert all(bool(t.isfinite().all()) for t in direct.state_dict().values())


@pytest.mark.parametrize("experts", moezoo.experts.names())
@pytest.mark.parametrize("num_experts", [0, 4])
def test_a_model_with_any_experts_is_drawn_by_its_config(experts: str, num_experts: int) -> None:
    config = TINY.replace(experts=experts, num_experts=num_experts, initializer_factor=2.0)
    late: Any = emptied(moezoo.build(config, device="meta"))
    torch.manual_seed(3)
    late.reset_parameters()
    assert_same_state(late, moezoo.build(config, seed=3))


def test_the_class_itself_draws_as_build_does_up_to_the_draws() -> None:
    direct, built = TASKS["model"](TINY).state_dict(), moezoo.build(TINY, task="model")
    for name, tensor in built.state_dict().items():
        assert float(tensor.std()) == pytest.approx(float(direct[name].std()), rel=0.35), name


@pytest.mark.parametrize("dtype", HALVES)
@every_part
def test_buffers_are_float32_however_a_module_comes_to_half_precision(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = make()
    with default_dtype(dtype):
        built = make()
        with torch.device("meta"):
            late: Any = make()
        emptied(late).reset_parameters()
    assigned = make()
    halved = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.state_dict().items()}
    assigned.load_state_dict(halved, assign=True)
    loaded = copy.deepcopy(plain).to(dtype)
    loaded.load_state_dict(halved)
    roads = [built, late, make().to(dtype), assigned, loaded, copy.deepcopy(built)]
    roads += [make().to(torch.float64).to(dtype)]
    for module in roads:
        assert_wide(module)
        assert all(p.dtype == dtype for p in module.parameters())
    exact = dict(plain.named_buffers())
    for module in roads[:3]:  # the others went through half precision, which rounds
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, exact[name]), name


def in_every_way(router: str, dtype: torch.dtype, folder: Path) -> Iterator[tuple[str, nn.Module]]:
    """Models with half-precision weights, by every road that there is."""
    model = moezoo.build(TINY, router=router, seed=0)
    yield "built", moezoo.build(TINY, router=router, dtype=dtype)
    with default_dtype(dtype):
        built = moezoo.build(TINY, router=router), TASKS["model"](model.config)
    yield "built by default", built[0]
    yield "made by default", built[1]
    yield "cast", copy.deepcopy(model).to(dtype)
    moezoo.save(model, folder / "wide")
    moezoo.save(copy.deepcopy(model).to(dtype), folder / "narrow")
    yield "loaded in half precision", moezoo.load(folder / "wide", dtype=dtype)
    yield "loaded as stored", moezoo.load(folder / "narrow")
    late = moezoo.build(TINY, router=router, dtype=dtype, device="meta")
    late.to_empty(device="cpu").reset_parameters()
    yield "emptied and reset", late
    late = moezoo.build(TINY, router=router, device="meta").to(dtype)
    halves = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    late.load_state_dict(halves, assign=True)
    if (router, dtype) != ("relu", torch.float16):  # whose coefficient is 0 there
        yield "assigned", late
    fsdp = copy.deepcopy(model).to(dtype)
    for buffer in fsdp.buffers():  # as FSDP's `buffer_dtype` does, behind every module's back
        if buffer.is_floating_point() and dtype == torch.bfloat16:
            buffer.data = buffer.to(dtype)
    yield "data cast", fsdp


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("router", ADAPTIVE)
def test_a_balancing_step_moves_the_state_after_every_road(
    router: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    for road, model in in_every_way(router, dtype, tmp_path):
        layer: Any = next(m for m in model.modules() if isinstance(m, moezoo.MoE))
        if road != "data cast":
            assert_wide(model)
        assert all(bool(b.isfinite().all()) for b in model.buffers()), road
        if router == "sigmoid_top_k":
            layer.router.expert_bias += 0.5  # where bfloat16 has steps of 0.004
        before = {name: b.clone() for name, b in layer.router.named_buffers()}
        tokens = Tokens(torch.randn(13, TINY.d_model, dtype=dtype))  # never even over 4 experts
        layer.router.adapt([layer.router(tokens)])
        assert_wide(layer.router)
        moved = [n for n, b in layer.router.named_buffers() if not torch.equal(b, before[n])]
        assert moved, f"{road}: nothing moved"
        if router == "sigmoid_top_k" and road != "data cast":
            step = (layer.router.expert_bias - before["expert_bias"]).abs()
            assert torch.allclose(step[step > 0], torch.tensor(0.001), atol=1e-6), road
        if router == "relu":
            assert float(before["coefficient"]) > 0.0, road


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_precision_model_has_the_weights_of_its_seed_rounded(dtype: torch.dtype) -> None:
    wide = moezoo.build(TINY, router="sigmoid_top_k", seed=1)
    narrow = moezoo.build(TINY, router="sigmoid_top_k", seed=1, dtype=dtype)
    assert_same_state(narrow, wide.to(dtype))


def test_integer_buffers_keep_their_type_when_others_are_assigned() -> None:
    router: Any = moezoo.routers.build("hash", vocab_size=VOCABULARY, **SIZES)
    state = {"table": router.table.to(torch.int32)}
    router.load_state_dict(state, assign=True)
    assert router.table.dtype == torch.int64
    router(Tokens(torch.randn(3, D_MODEL), torch.tensor([0, 5, 23])))


def test_a_balancing_buffer_of_your_own_is_kept_too() -> None:
    class Mine(Router):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("level", torch.zeros(3, dtype=torch.bfloat16))
            self.register_buffer("nothing", None)

        def reset_own(self) -> None:
            self.level.zero_()

    router: Any = Mine()
    assert router.level.dtype == torch.float32
    router.level = torch.ones(3, dtype=torch.float16)
    assert router.half().level.dtype == torch.float32
    assert router.double().level.dtype == torch.float64


def test_feed_forward_and_stacked_experts_start_equally_wide() -> None:
    torch.manual_seed(0)
    lone, stacked = FeedForward(64, 256), StackedExperts(64, 256, 4)
    for name, fan_in in (("wi", 64), ("wo", 256)):
        for weight in (lone.get_submodule(name).weight, stacked.get_parameter(name)):
            assert float(weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.02)
            assert float(weight.detach().abs().max()) < 2.28 * fan_in**-0.5  # cut at two


def test_routers_start_in_a_model_as_they_do_alone() -> None:
    model = moezoo.build(TINY, router="noisy_top_k", seed=0)
    noise = [t for n, t in model.state_dict().items() if n.endswith("noise.weight")]
    assert noise and all(bool((t == 0).all()) for t in noise)
    cosine: Any = moezoo.build(TINY, router="cosine", seed=0).encoder.blocks[1].mlp.router
    rows: Tensor = cosine.classifier.weight.detach()
    torch.testing.assert_close(rows.t() @ rows, torch.eye(rows.shape[1]))
    soft: Any = moezoo.build(TINY, router="soft", seed=0, allow_noncausal=True)
    phi = torch.cat([t.flatten() for n, t in soft.state_dict().items() if n.endswith("phi")])
    assert float(phi.std()) == pytest.approx(TINY.d_model**-0.5, rel=0.25)


def test_a_module_without_initial_values_is_refused_by_name() -> None:
    class Silent(Component):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    with pytest.raises(MoezooError, match="Silent.*'weight' starts.*reset_own"):
        Silent().reset_parameters()
    holder = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(MoezooError, match="MultiheadAttention.*reset_parameters"):
        redraw(holder)


def test_threads_that_build_at_once_get_their_own_dtypes_and_seeds() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    alone = [moezoo.build(TINY, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    found: dict[int, list[nn.Module]] = {0: [], 1: [], 2: []}
    gate = threading.Barrier(len(dtypes))

    def work(index: int) -> None:
        gate.wait()
        for _ in range(4):
            found[index].append(moezoo.build(TINY, dtype=dtypes[index], seed=index))

    torch.manual_seed(9)
    state = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), state), "a seed of its own draws from nobody else"
    assert torch.get_default_dtype() == torch.float32
    for index, expected in enumerate(alone):
        assert len(found[index]) == 4
        for model in found[index]:
            assert_same_state(model, expected)
