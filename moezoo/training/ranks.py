"""Training over ranks: what each contributes, and what all must agree on.

Every rank holds other rows of a batch, and gradients are averaged over ranks. A loss that is a mean
over a rank's labels therefore weighs as the rank's share of all labels times the number of ranks;
router losses weigh alike on every rank. In a run of one process every function here is the
identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moezoo.errors import ConfigError, RanksDiffer
from moezoo.functional.collective import data_group, num_ranks, rank, summed_over_ranks
from moezoo.functional.shards import is_sharded, unwrapped
from moezoo.losses import LoadBalanceLoss, ZLoss
from moezoo.models.output import SwitchOutput
from moezoo.training.batches import IGNORED, Batches


@dataclass(frozen=True)
class Share:
    """How one batch of a step weighs on this rank: `labels` what is a mean over labels, `routers`
    the router losses.
    """

    labels: float
    routers: float

    def of(self, output: SwitchOutput, model: nn.Module) -> Tensor:
        """The batch's part of the step's loss."""
        assert output.loss is not None
        loss: Tensor = output.loss * self.labels
        routers = None if self.labels == self.routers else _router_part(output, model)
        return loss if routers is None else loss + routers * (self.routers - self.labels)

    def parts(self, output: SwitchOutput, model: nn.Module) -> dict[str, float]:
        """The losses of the batch by name, weighed; "total" among them."""
        assert output.loss is not None
        routers = _router_losses(model)
        total = float(output.loss.detach()) * self.labels
        if self.labels != self.routers:
            part = _router_part(output, model)
            total += 0.0 if part is None else float(part.detach()) * (self.routers - self.labels)
        found = {"total": total}
        for name, value in output.losses.items():
            share = self.routers if name in routers else self.labels
            found[name] = float(value.detach()) * share
        return found


def shares(targets: Sequence[int], device: torch.device) -> list[Share]:
    """The shares of a step's batches, of so many target tokens each on this rank: every target
    token weighs the same, whatever its batch and rank.
    """
    ranks = num_ranks()
    everywhere = list(targets)
    if ranks > 1:
        everywhere = summed_over_ranks(torch.tensor(everywhere, device=device)).tolist()
    total = max(sum(everywhere), 1)
    pairs = zip(targets, everywhere, strict=True)
    return [Share(own * ranks / total, every / total) for own, every in pairs]


def mean_losses(losses: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The mean over ranks of each loss."""
    if num_ranks() == 1:
        return dict(losses)
    values = torch.tensor(list(losses.values()), dtype=torch.float64, device=device)
    return dict(zip(losses, (summed_over_ranks(values) / num_ranks()).tolist(), strict=True))


def summed(value: int, device: torch.device) -> int:
    """A count over all ranks."""
    if num_ranks() == 1:
        return value
    return int(summed_over_ranks(torch.tensor(value, device=device)))


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is so on one rank at least: what one decides alone the others would wait for."""
    return summed(int(flag), device) > 0


def first_of_ranks(answer: str) -> str:
    """The answer of the first rank that has one."""
    return next((each for each in gathered(answer) if each), "")


def gathered(value: Any) -> list[Any]:
    """A small object of every rank, on every rank."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value, group=data_group())
    return found


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises RanksDiffer, on every rank, where a fact is not the same on all."""
    mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
    first, *others = gathered(mine)
    for number, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                hint = "Start every rank with the same command and the same files."
                raise RanksDiffer(
                    f"{name} of rank {number} is not that of rank 0",
                    key=name,
                    expected=first.get(name),
                    found=other.get(name),
                    hint=hint,
                )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of whole tensors; a rank's part of a sharded one is its own, and left out."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        if type(tensor) in (Tensor, nn.Parameter):
            wide = tensor.detach().double()
            found.update(f"{name} {float(wide.sum())!r} {float(wide.abs().sum())!r}".encode())
    return found.hexdigest()[:16]


class RowsOfRank:
    """The rows of a global batch that are this rank's: rank r of W takes those from r B / W on.

    Padding stays that of the whole batch. A rank without a row has one that counts nowhere, so that
    it takes part.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Rows of batch `step`."""
        batch, ranks = self.batches(step), num_ranks()
        rows = batch["labels"].shape[0]
        first, last = (rows * (rank() + i) // ranks for i in (0, 1))
        if first < last:
            return {name: tensor[first:last] for name, tensor in batch.items()}
        row = {name: tensor[:1].clone() for name, tensor in batch.items()}
        row["labels"].fill_(IGNORED)
        row["attention_mask"].zero_()
        return row


def of_rank(batches: Batches) -> Batches:
    """This rank's rows of global batches."""
    return batches if num_ranks() == 1 else RowsOfRank(batches)


@contextmanager
def batch_of_all_ranks(model: nn.Module) -> Iterator[None]:
    """Within the block, router losses over "batch" are over the batch of all ranks, where the
    config does not say a scope: one batch is what the ranks share. The config stays as it is.
    """
    config = getattr(unwrapped(model), "config", None)
    said = dict(getattr(config, "router_losses", None) or {})
    changed: list[LoadBalanceLoss | ZLoss] = []
    for name, loss in _router_losses(model).items() if num_ranks() > 1 else ():
        options = said.get(name)
        silent = not (isinstance(options, Mapping) and "scope" in options)
        if isinstance(loss, (LoadBalanceLoss, ZLoss)) and loss.scope == "batch" and silent:
            loss.scope = "global"
            changed.append(loss)
    try:
        yield
    finally:
        for loss in changed:
            loss.scope = "batch"


def reducing(model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """For the forward and backward of one batch: gradients meet those of other ranks after the last
    one of a step alone.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if _is_fsdp(model):
        fsdp: Any = model
        fsdp.set_requires_gradient_sync(last)
    return nullcontext()


def mesh_of_gradients(model: nn.Module, given: Any = None) -> Any:
    """Over which mesh the gradients of a model are to be averaged after backward; None where nobody
    needs to, because DistributedDataParallel or FSDP2 does.

    Args:
        given: the mesh that its experts are divided along.

    Raises ConfigError where that is not known.
    """
    averaged = isinstance(model, nn.parallel.DistributedDataParallel) or _is_fsdp(model)
    if num_ranks() == 1 or averaged or given is not None:
        return None if averaged else given
    if is_sharded(model):
        hint = "Pass the mesh that moezoo.parallel.expert_parallel was given."
        raise ConfigError("the experts are divided along a mesh", field="mesh", hint=hint)
    from moezoo.parallel import mesh

    return mesh(1, device=next(model.parameters()).device)


def average_gradients(model: nn.Module, mesh: Any) -> None:
    """Average the gradients over ranks along a mesh of `mesh_of_gradients`."""
    if num_ranks() > 1 and mesh is not None:
        from moezoo.parallel import mean_gradients

        mean_gradients(model, mesh)


def clipped_norm(model: nn.Module, limit: float) -> float:
    """The norm of all gradients, which are scaled to at most `limit`; the same on every rank. Where
    it is not finite they stay as they are: NaN times all of them would hide the one that is at
    fault.
    """
    if num_ranks() == 1:
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if bool(norm.isfinite()):
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)
    from moezoo.parallel import clip_grad_norm

    return float(clip_grad_norm(model, limit))


def guarded(step: int) -> AbstractContextManager[None]:
    """`moezoo.parallel.guard`, where there are other ranks to lose."""
    if num_ranks() == 1:
        return nullcontext()
    from moezoo.parallel import guard

    return guard(step)


def seed_of_step(seed: int, step: int) -> int:
    """The seed of a step's random numbers on this rank: other ones on every rank, and the same ones
    again when the step is repeated.
    """
    key = hashlib.sha256(f"{seed}\0{step}\0{rank()}".encode()).digest()
    return int.from_bytes(key[:8], "little") >> 1


def _is_fsdp(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def _router_losses(model: nn.Module) -> dict[str, nn.Module]:
    """The router losses of a model by name; none of a model that is not moezoo's."""
    owner = getattr(unwrapped(model), "router_losses", None)
    return dict(getattr(owner, "losses", {}))


def _router_part(output: SwitchOutput, model: nn.Module) -> Tensor | None:
    """The weighted router losses within an output's loss."""
    names = _router_losses(model)
    losses = {name: value for name, value in output.losses.items() if name in names}
    if not losses:
        return None
    owner: Any = unwrapped(model).router_losses
    found: Tensor | None = owner.weighted(losses)
    return found
