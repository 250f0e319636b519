"""Every private name of torch that this package uses, each for what torch says nowhere in public.

They may change with any version of torch; tests/test_private_torch.py says what is relied on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils import _pytree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_Module = TypeVar("_Module", bound=nn.Module)
_Class = TypeVar("_Class")
# From so many rows on, a row of oneDNN's product has the same bits whatever rows are beside it: all
# but a single one with torch 2.12 and 2.13, 16 with 2.10; 2.11 was not tried.
STEADY_ROWS = 2 if [int(part) for part in torch.__version__.split(".")[:2]] >= [2, 12] else 16
_FORWARD, _BEFORE = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
_BACKWARD = torch_module._global_backward_hooks
_BEFORE_BACKWARD = torch_module._global_backward_pre_hooks


def is_seen_through(record: type[_Class]) -> type[_Class]:
    """A class decorator: torch finds the tensors in a dataclass. DDP and FSDP hook what a module
    returns and is given; they take what they do not know for one object without a gradient, which
    trains wrongly and in silence (DDP with `static_graph`).
    """
    names = [field.name for field in dataclasses.fields(record)]  # type: ignore[arg-type]
    _pytree.register_dataclass(record, field_names=names, drop_field_names=[])
    return record


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs a hook, its own or one of all modules, or what it was
    compiled to in place.
    """
    own = vars(module)
    if "_compiled_call_impl" in own:
        return True
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return True
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return bool(_FORWARD or _BEFORE or _BACKWARD or _BEFORE_BACKWARD)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return "_compiled_call_impl" in vars(module)


def is_made_by_compile(module: nn.Module) -> bool:
    """Whether this is what `torch.compile` made of a module: by the home of its class, since to
    import that is to import the compiler.
    """
    return type(module).__module__ == "torch._dynamo.eval_frame"


def is_traced_by_jit() -> bool:
    """Whether `torch.jit.trace` watches."""
    return torch._C._get_tracing_state() is not None


def is_differentiated_forward() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    level: int = forward_ad._current_level
    return level >= 0


# Whether a transform of `torch.func`, such as `grad`, is active.
is_within_func: Callable[[], bool] = torch._C._are_functorch_transforms_active


def are_tangents_on() -> bool:
    """Whether forward-mode differentiation follows what is computed now."""
    on: bool = torch._C._is_fwd_grad_enabled()
    return on


def tangents(on: bool) -> AbstractContextManager[object]:
    """A block in which forward-mode differentiation follows, or does not."""
    block: AbstractContextManager[object] = forward_ad._set_fwd_grad_enabled(on)
    return block


def is_batched_by_autograd(x: Tensor) -> bool:
    """Whether `is_grads_batched` holds many gradients in the place of this one."""
    batched: bool = torch._C._functorch.is_legacy_batchedtensor(x)
    return batched


def is_batched_by_vmap(x: Tensor) -> bool:
    """Whether `torch.vmap`, at any level, holds many tensors in the place of this one."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_in_backward() -> bool:
    """Whether autograd runs backward on this thread: a forward pass there is the recomputation of
    a checkpointed one.
    """
    task: int = torch._C._current_graph_task_id()
    return task != -1


def own_parameters(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """A module's own parameters by name, in a tenth of the time of `parameters(recurse=False)`.
    What is put there takes their place, unseen by whoever shards the model.
    """
    return module._parameters


def shallow_copy(module: _Module) -> _Module:
    """A copy with the same tensors and children, of which the children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (n, K) times b (K, M), both int8: (n, M) int32, exact."""
    return torch._int_mm(a, b)


def onednn_product(x: Tensor, weight: Tensor, *, relu: bool) -> Tensor:
    """x (n, K) contiguous times weight (M, K) transposed by oneDNN, float32 on a CPU, with relu on
    top if wanted: the operator that `torch.compile` itself emits for a linear layer there.
    """
    attribute = "relu" if relu else "none"
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, attribute, [], None)
    return fused


def softmax_gradient(grad: Tensor, probs: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of what softmax made `probs` of, along the last dimension, into `out` (which
    may be `grad` itself) if there is one.
    """
    if out is None:
        made: Tensor = torch.ops.aten._softmax_backward_data(grad, probs, -1, probs.dtype)
        return made
    operator = torch.ops.aten._softmax_backward_data.out
    written: Tensor = operator(grad, probs, -1, probs.dtype, grad_input=out)
    return written


def share_timeout(groups: Iterable[ProcessGroup], device: str) -> None:
    """Give process groups the timeout of the first one: those of a mesh have torch's otherwise,
    half an hour, whatever the user said.
    """
    from torch.distributed import distributed_c10d  # which not every build of torch has

    place = torch.device(device)
    timeout = distributed_c10d._get_default_group()._get_backend(place).options._timeout
    for group in groups:
        distributed_c10d._set_pg_timeout(timeout, group)


def flattened(mesh: DeviceMesh) -> DeviceMesh:
    """A mesh of the same ranks in one dimension."""
    return mesh if mesh.ndim == 1 else mesh._flatten()


def unflattened(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of one dimension as one of several."""
    made: DeviceMesh = mesh._unflatten(0, sizes, names)
    return made
