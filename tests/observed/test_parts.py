"""Whoever looks in on a part of a layer sees it called, and what is changed reaches the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

import moezoo
from moezoo import experts, routers, traces
from moezoo.layer import MoE
from moezoo.ops.observed import is_compiled, is_observed, is_plain
from moezoo.recording import record

from .observers import ALL, QUICK, code

CALLS = [(rows, grad) for rows in (1, 3) for grad in (False, True)]
ROUTERS = [name for name in routers.names() if name not in ("random", "hash", "soft")]


def layer(router: object = "switch", container: str = "stacked") -> MoE:
    torch.manual_seed(0)
    made = moezoo.SparseMLP(
        8, 12, 4, router=router, experts=container, vocab_size=9, shared={"d_ff": 4, "gated": True}
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.6 if parameter.dim() else 0.0) + 0.1)
    return made.moe.eval()


def out(moe: nn.Module, rows: int, grad: bool) -> Tensor:
    x = torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(rows))
    ids = torch.arange(rows)[None] % 9
    with torch.set_grad_enabled(grad):
        y, _ = moe(x, token_ids=ids)
    return y.detach()


def linear_parts(moe: MoE) -> list[str]:
    """The linear maps of router, container and shared branch."""
    return [name for name, module in moe.named_modules() if type(module) is nn.Linear]


def difference(module: nn.Module) -> Tensor:
    weight = module.weight
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_gate_that_is_observed_is_called(router: str, way: str) -> None:
    for part in [name for name in linear_parts(layer(router)) if "expert" not in name]:
        moe, wanted = layer(router), layer(router)
        delta = difference(moe.get_submodule(part))
        plain = [out(moe, *call) for call in CALLS]
        wanted.get_submodule(part).weight.data += delta
        calls: list[int] = []

        def change(inputs: Any, output: Tensor, delta: Tensor = delta, seen: Any = calls) -> Tensor:
            seen.append(1)
            return output + F.linear(inputs[0], delta)

        for number, call in enumerate(CALLS):
            with QUICK[way](moe, part, change):
                found = out(moe, *call)
            assert len(calls) == number + 1
            torch.testing.assert_close(found, out(wanted, *call), atol=1e-4, rtol=1e-4)
        if part == "router.classifier" and router in ("switch", "sigmoid_top_k"):
            assert not torch.equal(found, plain[-1])


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.parametrize("container", ["modules", "lora"])
def test_a_linear_map_of_experts_that_is_observed_is_called(container: str, way: str) -> None:
    for part in [name for name in linear_parts(layer("switch", container)) if "experts" in name]:
        moe, wanted = layer("switch", container), layer("switch", container)
        delta = difference(moe.get_submodule(part))
        wanted.get_submodule(part).weight.data += delta

        def change(inputs: Any, output: Tensor, delta: Tensor = delta) -> Tensor:
            return output + F.linear(inputs[0], delta)

        for call in CALLS:
            with QUICK[way](moe, part, change):
                found = out(moe, *call)
            torch.testing.assert_close(found, out(wanted, *call), atol=1e-4, rtol=1e-4)


def doubled(inputs: Any, output: Any) -> Any:
    """Twice the rows, or twice the weights of a routing."""
    if isinstance(output, Tensor):
        return 2.0 * output
    assignment = output.assignment
    if hasattr(assignment, "combine"):
        return replace(output, assignment=replace(assignment, combine=2.0 * assignment.combine))
    return replace(output, assignment=replace(assignment, weight=2.0 * assignment.weight))


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.parametrize("part", ["router", "experts"])
@pytest.mark.parametrize(
    ("router", "container"),
    [(name, "stacked") for name in routers.names()]
    + [("switch", name) for name in experts.names() if name != "stacked"],
)
def test_a_router_and_a_container_that_are_observed_are_called(
    router: str, container: str, part: str, way: str
) -> None:
    moe = layer(router, container)
    if router == "top_k":
        moe.router.normalize = "none"
    moe.shared = None
    for call in CALLS:
        plain = out(moe, *call)
        with QUICK[way](moe, part, doubled):
            found = out(moe, *call)
        torch.testing.assert_close(found, 2.0 * plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.parametrize("container", experts.names())
def test_dropout_of_experts_that_is_observed_is_called(container: str, way: str) -> None:
    moe = layer("switch", container)
    moe.shared = None
    names = [n for n, m in moe.named_modules() if isinstance(m, nn.Dropout)]
    assert names
    for call in CALLS:
        plain, y = out(moe, *call), torch.zeros(())
        for name in names:
            with QUICK[way](moe, name, lambda _, output: 2.0 * output):
                y = y + out(moe, *call) - plain
        # Other kinds of expert than networks have no hidden units.
        torch.testing.assert_close(y, plain if container != "zero" else y, atol=1e-5, rtol=1e-5)
        assert container != "stacked" or y.any()


@pytest.mark.parametrize("part", ["router", "experts", "router.classifier", "shared.gate"])
def test_a_compiled_part_is_called(part: str) -> None:
    moe = layer()
    plain = [out(moe, *call) for call in CALLS]
    seen: list[int] = []
    with ALL["compiled"](moe, part, lambda _, output: output):
        owner, _, leaf = part.rpartition(".")
        moe.get_submodule(owner)._modules[leaf].register_forward_hook(lambda *_: seen.append(1))
        found = [out(moe, *call) for call in CALLS]
    assert len(seen) == len(CALLS)
    torch.testing.assert_close(found, plain)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS)
def test_gates_with_weights_of_others_compute_in_float32(router: str, dtype: torch.dtype) -> None:
    moe, wanted = layer(router).to(dtype), layer(router).to(dtype)
    gates = [n for n in linear_parts(moe) if "expert" not in n]
    for name in gates:
        parametrize.register_parametrization(moe.get_submodule(name), "weight", Doubled())
        wanted.get_submodule(name).weight.data *= 2.0
    for rows, grad in CALLS:
        x = torch.randn(1, rows, 8, dtype=dtype, generator=torch.Generator().manual_seed(3))
        with torch.set_grad_enabled(grad):
            found, routing = moe(x)
            expected, _ = wanted(x)
        torch.testing.assert_close(found, expected)
        assert routing.logits is None or routing.logits.dtype == torch.float32


@pytest.mark.parametrize("router", ["switch", "cosine", "noisy_top_k", "streamed_switch"])
def test_pruned_and_normalised_gates_are_what_they_are_without_the_tool(router: str) -> None:
    for name in [n for n in linear_parts(layer(router)) if "expert" not in n]:
        moe = layer(router)
        part = moe.get_submodule(name)
        prune.random_unstructured(part, "weight", amount=0.5)
        with torch.no_grad():
            part.weight_orig.mul_(3.0)  # whoever reads `weight` now reads an old one
        found = [out(moe, *call) for call in CALLS]
        prune.remove(part, "weight")
        torch.testing.assert_close(found, [out(moe, *call) for call in CALLS])
        normal = layer(router)
        plain = [out(normal, *call) for call in CALLS]
        nn.utils.parametrizations.weight_norm(normal.get_submodule(name))
        found = [out(normal, *call) for call in CALLS]
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_a_backward_hook_of_a_gate_fires_and_its_change_reaches_the_input() -> None:
    moe, seen = layer(), []

    def stop(module: nn.Module, grad_in: Any, grad_out: Any) -> tuple[Tensor]:
        seen.append(1)
        return (torch.zeros_like(grad_in[0]),)

    for rows in (1, 3):
        x = torch.randn(1, rows, 8, requires_grad=True)
        expected = torch.autograd.grad(moe(x)[0].sum(), x)[0]
        handle = moe.router.classifier.register_full_backward_hook(stop)
        found = torch.autograd.grad(moe(x)[0].sum(), x)[0]
        handle.remove()
        assert not torch.allclose(found, expected)
    assert seen == [1, 1]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_gates_of_eight_bits_are_called() -> None:
    moe = layer()
    plain = [out(moe, *call) for call in CALLS]
    torch.ao.quantization.quantize_dynamic(moe.router, {nn.Linear}, inplace=True)
    torch.ao.quantization.quantize_dynamic(moe.shared, {nn.Linear}, inplace=True)
    assert type(moe.router.classifier) is not nn.Linear
    for call, expected in zip(CALLS, plain, strict=True):
        torch.testing.assert_close(out(moe, *call), expected, atol=0.3, rtol=0.3)


@pytest.mark.parametrize("router", ["switch", "top_k", "streamed_switch"])
def test_gates_that_another_tool_rounds_are_called(router: str) -> None:
    coded, plain = layer(router), layer(router)
    code(coded.router.classifier)
    weight = coded.router.classifier.weight
    plain.router.classifier.weight.data = weight.rounded * weight.scale
    for call in CALLS:
        torch.testing.assert_close(out(coded, *call), out(plain, *call))


def test_a_gate_in_half_precision_that_is_offloaded_is_refused_by_name() -> None:
    moe = layer().bfloat16()
    moe.router.classifier.to("meta").register_forward_pre_hook(lambda *_: None)
    with pytest.raises(moezoo.MoezooError, match="Linear in half precision is offloaded"):
        moe(torch.randn(1, 2, 8, dtype=torch.bfloat16))


def test_an_offloaded_layer_computes_the_same() -> None:
    accelerate = pytest.importorskip("accelerate")
    moe = layer("noisy_top_k")
    plain = [out(moe, *call) for call in CALLS]
    accelerate.cpu_offload(moe, execution_device=torch.device("cpu"))
    assert moe.router.classifier.weight.is_meta
    torch.testing.assert_close([out(moe, *call) for call in CALLS], plain)


def test_a_tape_holds_calls_of_its_own_modules_and_thread_alone() -> None:
    import copy
    import threading

    model = nn.ModuleDict({"mlp": layer()})
    with record(model) as tape:
        other = copy.deepcopy(model)
        out(other["mlp"], 2, False)
        thread = threading.Thread(target=out, args=(model["mlp"], 2, False))
        thread.start()
        thread.join()
        with pytest.raises(moezoo.MoezooError, match="nothing was recorded"):
            tape.loss({"load_balance": 1.0})
        out(model["mlp"], 2, False)
    assert len(tape.by_layer["mlp"]) == 1


def test_a_tape_without_calls_has_no_loss() -> None:
    model = nn.ModuleDict({"mlp": layer()})
    with record(model) as tape:
        pass
    for ask in (tape.stats, tape.adapt, lambda: tape.losses("z"), lambda: traces.of(tape)):
        with pytest.raises(moezoo.MoezooError, match="nothing was recorded"):
            ask()


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
        lambda _, hook: torch_module.register_module_forward_hook(hook),
        lambda _, hook: torch_module.register_module_forward_pre_hook(hook),
        lambda _, hook: torch_module.register_module_full_backward_hook(hook),
        lambda _, hook: torch_module.register_module_full_backward_pre_hook(hook),
    ],
)
def test_a_hook_of_any_kind_observes_until_it_is_removed(register: Any) -> None:
    module = nn.Linear(2, 2)
    handle = register(module, lambda *_: None)
    assert not is_plain(module, nn.Linear)
    handle.remove()
    assert is_plain(module, nn.Linear)
    assert not is_plain(module, nn.Embedding)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_patches_and_compilation_observe() -> None:
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    assert is_observed(module) and is_compiled(module) and is_compiled(torch.compile(module))
    layer_ = layer()
    assert not is_observed(layer_, "route") and not is_compiled(layer_)
    layer_.__dict__["route"] = layer_.route
    assert is_observed(layer_, "route") and is_observed(layer_, whole=True)
    before, nn.Module.__call__ = nn.Module.__call__, lambda *_: None  # type: ignore[method-assign]
    try:
        assert is_observed(nn.Linear(2, 2))
    finally:
        nn.Module.__call__ = before  # type: ignore[method-assign]


def test_a_compiled_layer_that_is_not_seen_is_refused_by_name() -> None:
    model = nn.ModuleDict({"one": layer(), "two": layer()})
    model["two"].compile(backend="eager")
    x = torch.randn(1, 2, 8)
    with record(model) as tape:
        model["one"](x)
    with pytest.raises(moezoo.MoezooError, match="'two' is compiled"):
        tape.loss({"z": 1.0})
