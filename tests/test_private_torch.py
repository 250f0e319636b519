"""What is relied on of torch's private names, and that they stand in one file."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import moezoo
from moezoo import private_torch
from tests.imports import ROOT, SOURCES, module_name, parsed

# Names of `nn.Module` that a subclass, or whoever reads `vars`, may meet.
OF_MODULES = {
    name
    for name in (*dir(nn.Module), *vars(nn.Linear(1, 1)))
    if name.startswith("_") and not name.startswith("__")
}
HOME = ROOT / "moezoo" / "private_torch.py"
# What every cast and move of a module calls, and the one method of torch's ParallelStyle, which is
# public: torch has no public name for either.
OVERRIDDEN = {("moezoo/component.py", "_apply"), ("moezoo/parallel/style.py", "_apply")}


def private_names(tree: ast.Module) -> Iterator[str]:
    """The private names of torch that a source file uses."""
    bound = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            bound |= {alias.asname or alias.name for alias in node.names}
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from filter(_is_private, names)
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            bound |= {alias.asname or "torch" for alias in ours}
            yield from (n for a in ours for n in a.name.split(".") if _is_private(n))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            root = ast.unparse(node).split(".")[0]
            if root in bound or node.attr in OF_MODULES:
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in OF_MODULES or node.value.startswith("torch._"):
                yield node.value
        elif isinstance(node, ast.ClassDef):
            named = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            yield from (name for name in named if name in OF_MODULES)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", [p for p in SOURCES if p != HOME], ids=module_name)
def test_no_other_file_uses_a_private_name_of_torch(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    assert {
        name for name in private_names(parsed(path)) if (where, name) not in OVERRIDDEN
    } == set()


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._int_mm(a, b)",
        "import torch as t\nt.ops.mkldnn._linear_pointwise",
        "from torch.autograd import forward_ad as ad\nad._current_level",
        "from torch._dynamo import eval_frame",
        "import torch._dynamo",
        "from torch.nn.modules.module import _global_forward_hooks",
        "vars(m)['_forward_hooks']",
        "m._parameters",
        "type(m).__module__ == 'torch._dynamo.eval_frame'",
        "class A(B):\n    def _apply(self): ...",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert list(private_names(ast.parse(source)))


def test_public_and_own_names_are_not_taken_for_private_ones() -> None:
    source = "import torch\nself._handles\ntorch.mm(a, b)\nx.__class__\n_twin(torch.ones(1))"
    assert not list(private_names(ast.parse(source)))


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        lambda _: torch_module.register_module_forward_hook(lambda *_: None),
        lambda _: torch_module.register_module_forward_pre_hook(lambda *_: None),
        lambda _: torch_module.register_module_full_backward_hook(lambda *_: None),
        lambda _: torch_module.register_module_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_a_hook_of_any_kind_is_seen_as_long_as_it_is_there(
    register: Callable[[nn.Module], torch.utils.hooks.RemovableHandle],
) -> None:
    module = nn.Linear(2, 2)
    assert not private_torch.is_hooked(module)
    handle = register(module)
    assert private_torch.is_hooked(module)
    handle.remove()
    assert not private_torch.is_hooked(module)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of the compiler itself
def test_what_was_compiled_is_known() -> None:
    module = nn.Linear(2, 2)
    assert not private_torch.is_compiled_in_place(module)
    assert not private_torch.is_made_by_compile(module)
    assert private_torch.is_made_by_compile(torch.compile(module))
    module.compile()
    assert private_torch.is_compiled_in_place(module) and private_torch.is_hooked(module)


def test_tracing_forward_differentiation_and_transforms_are_seen_while_they_last() -> None:
    asked = (
        private_torch.is_traced_by_jit,
        private_torch.is_differentiated_forward,
        private_torch.is_within_func,
    )
    seen: list[tuple[bool, ...]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(ask() for ask in asked))
        return x.square().sum()

    look(torch.ones(2))
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.trace"):
        torch.jit.trace(look, torch.ones(2), check_trace=False)
    with forward_ad.dual_level():
        look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.vmap(look)(torch.ones(2, 2))
    look(torch.ones(2))
    none = (False, False, False)
    traced, forward, func = (True, False, False), (False, True, False), (False, False, True)
    assert seen == [none, traced, forward, func, func, none]


def test_a_recomputation_runs_in_backward_and_nothing_else_does() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(private_torch.is_in_backward())
        return x.sin().cos()

    y = checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert seen == [False]
    y.sum().backward()
    assert seen == [False, True] and not private_torch.is_in_backward()
    other = threading.Thread(target=look, args=(torch.ones(1),))
    other.start()
    other.join()
    assert seen == [False, True, False]


def test_torch_finds_the_tensors_in_a_record() -> None:
    from torch.utils import _pytree

    layer = moezoo.SparseMLP(8, 16, 4).moe
    _, routing = layer(torch.randn(3, 8))
    found = _pytree.tree_leaves((routing,))
    assert any(leaf is routing.probs for leaf in found)
    assert any(leaf is routing.assignment.weight for leaf in found)
    twice = _pytree.tree_map(
        lambda x: x * 2 if torch.is_tensor(x) and x.dtype.is_floating_point else x, routing
    )
    assert (
        torch.equal(twice.probs, 2 * routing.probs) and twice.losses.keys() == routing.losses.keys()
    )


def test_own_parameters_are_those_of_the_module_without_its_children() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert dict(private_torch.own_parameters(module)) == {}
    own = private_torch.own_parameters(nn.Linear(2, 2, bias=False))
    assert list(own) == ["weight", "bias"] and own["bias"] is None


def test_children_of_a_shallow_copy_are_its_own_to_replace() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    twin = private_torch.shallow_copy(module)
    assert type(twin) is nn.Sequential and twin[0] is module[0]
    twin[0] = nn.Identity()
    assert isinstance(module[0], nn.Linear)


@pytest.mark.parametrize("rows", [1, 2, 17, 33])
def test_products_of_int8_are_exact(rows: int) -> None:
    a = torch.randint(-128, 128, (rows, 64), dtype=torch.int8)
    b = torch.randint(-128, 128, (24, 64), dtype=torch.int8)
    found = private_torch.int8_product(a, b.t())
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long().t())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_onednn_multiplies(relu: bool, transposed: bool) -> None:
    x = torch.randn(5, 16)
    weight = torch.randn(16, 8).t() if transposed else torch.randn(8, 16)
    expected = F.linear(x.double(), weight.double())
    expected = expected.relu() if relu else expected
    found = private_torch.onednn_product(x, weight, relu=relu)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    found.resize_(3, 8)  # it is a tensor of its own, no view
    assert found.shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_softmax_is_autograds_and_may_be_written_in_place(
    dtype: torch.dtype,
) -> None:
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 4, dtype=dtype)
    probs = x.softmax(-1)
    (expected,) = torch.autograd.grad(probs, x, grad)
    assert torch.equal(private_torch.softmax_gradient(grad, probs.detach()), expected)
    private_torch.softmax_gradient(grad, probs.detach(), out=grad)
    assert torch.equal(grad, expected)


def test_every_cast_and_move_of_a_module_goes_through_what_components_override() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("own", torch.ones(1))

        def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Watched:
            self.calls += 1
            return super()._apply(fn, recurse)

    module = Watched()
    parent = nn.Sequential(module)
    for change in (parent.bfloat16, parent.half, parent.double, lambda: parent.to("meta")):
        before = module.calls
        change()
        assert module.calls == before + 1


def test_batches_of_vmap_and_of_gradients_are_told_from_plain_tensors() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(private_torch.is_batched_by_vmap(x))
        return 2 * x

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(3, 2))
    torch.func.vmap(torch.func.grad(lambda x: look(x).sum()))(torch.ones(3, 2))
    assert seen == [False, True, True]

    class Asked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
            seen.append(private_torch.is_batched_by_autograd(grad))
            return grad

    x = torch.ones(2, requires_grad=True)
    out = Asked.apply(x)
    torch.autograd.grad(out, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(out, x, torch.eye(2), is_grads_batched=True)
    assert seen[3:] == [False, True]


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch's own rules
def test_tangents_are_switched_on_and_off() -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert private_torch.are_tangents_on()
        with private_torch.tangents(False):
            assert not private_torch.are_tangents_on()
            without = 2 * x
        assert forward_ad.unpack_dual(without).tangent is None
        assert forward_ad.unpack_dual(2 * x).tangent is not None
