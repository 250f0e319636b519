"""Expert parallelism: each rank holds some of the experts, and rows travel to them."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from moezoo import dispatchers
from moezoo.errors import ConfigError
from moezoo.experts import StackedExperts, ZeroExperts
from moezoo.functional.collective import set_data_group
from moezoo.functional.shards import refuse_sharded
from moezoo.layer import MoE
from moezoo.parallel.meshes import check_mesh
from moezoo.private_torch import flattened, own_parameters


class ExpertParallel(ParallelStyle):
    """A style for `parallelize_module`: the stacks of a `StackedExperts` become DTensors, Shard(0)
    on the mesh (1-D, of R ranks), and its rows travel by a dispatcher (GShard, 2006.16668).

    Args:
        dispatcher: "alltoall", "allgather", another that is registered, or an instance.
        gradients: "mean" or "sum"; see `moezoo.dispatchers.base.Dispatcher`.

    Raises ConfigError for another module, and for experts that R does not divide.
    """

    def __init__(
        self, *, dispatcher: object = "alltoall", gradients: Literal["mean", "sum"] = "mean"
    ) -> None:
        super().__init__()
        self.dispatcher, self.gradients = dispatcher, gradients

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not StackedExperts:
            raise _refusal(module, "")
        check_divides(module, device_mesh.size())
        module.dispatcher = dispatchers.build(
            self.dispatcher, group=device_mesh.get_group(), gradients=self.gradients
        )
        source = self.src_data_rank
        for name, whole in list(own_parameters(module).items()):
            assert whole is not None
            stack = distribute_tensor(whole.detach(), device_mesh, [Shard(0)], src_data_rank=source)
            module.register_parameter(name, nn.Parameter(stack, requires_grad=whole.requires_grad))
        return module


def plan(
    model: nn.Module,
    *,
    dispatcher: object = "alltoall",
    gradients: Literal["mean", "sum"] = "mean",
) -> dict[str, ParallelStyle]:
    """The style of every stack of experts by its module name, for torch's `parallelize_module`.

    Raises ConfigError for a model without a sparse layer, and for a container whose experts cannot
    be divided (`lora` and `modules`, one that is wrapped), naming it.
    """
    found: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        experts, where = module.experts, f"{name}.experts".lstrip(".")
        if type(experts) is ZeroExperts:  # what computes nothing does not travel
            experts, where = experts.experts, f"{where}.experts"
        if type(experts) is not StackedExperts:
            raise _refusal(experts, where)
        found[where] = ExpertParallel(dispatcher=dispatcher, gradients=gradients)
    if not found:
        raise ConfigError(f"{type(model).__name__} has no experts to divide", field="model")
    return found


def expert_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    dispatcher: object = "alltoall",
    gradients: Literal["mean", "sum"] = "mean",
) -> nn.Module:
    """Divide the experts of every sparse layer of a model along "ep"; the rest stays as it is.

    Every rank must have the same weights (build with a seed, or load). Afterwards a rank holds E /
    ep experts of each layer, and every rank must call the model equally often. What is not an
    expert gets gradients of this rank's tokens alone: call `mean_gradients` after backward, or use
    `shard`, whose FSDP2 does. On a mesh with an ep of 1 the model stays as it is.

    Args:
        model: any module that holds `MoE` layers; changed in place.
        mesh: see `moezoo.parallel.mesh`.
        dispatcher, gradients: see `ExpertParallel`.

    Returns:
        The model.

    Raises ConfigError for what `plan` refuses, and for a model that is sharded already.
    """
    mesh = check_mesh(mesh)
    refuse_sharded(model, "dividing experts")
    styles = plan(model, dispatcher=dispatcher, gradients=gradients)
    set_data_group(None if mesh.size() == dist.get_world_size() else flattened(mesh).get_group())
    for name in styles:  # before anything is changed
        check_divides(model.get_submodule(name), mesh["ep"].size())
    if mesh["ep"].size() == 1:
        return model
    made: nn.Module = parallelize_module(model, mesh["ep"], styles, src_data_rank=None)
    return made


def check_divides(experts: nn.Module, ranks: int) -> None:
    """Refuse ranks that would hold unequal numbers of experts. Raises ConfigError."""
    count: Any = experts.num_experts
    if count % ranks:
        hint = "Make the mesh with another ep."
        wanted, reason = f"a multiple of {ranks}", "the ranks do not divide the experts"
        raise ConfigError(reason, field="ep", expected=wanted, found=count, hint=hint)


def _refusal(module: nn.Module, where: str) -> ConfigError:
    kind = type(module).__name__
    hint = "The containers 'stacked', and 'zero' around it, can be divided, unwrapped."
    named = f"{where}: " if where else ""
    reason = f"{named}the experts of {kind} cannot be divided among ranks"
    return ConfigError(reason, field="experts", hint=hint)
