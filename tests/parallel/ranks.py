"""Claims that several processes check together: one set of processes per test file.

A claim is a function of a `Ranks`; `claims.over(2, 4)` says with how many ranks it is checked. A
test file starts four processes once, by `started`, and asks for each claim whether it held. They
are forked from a server that has imported torch, so that each costs little.
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moezoo
from moezoo.parallel import mesh
from tests.models.tiny import TINY

PRELOADED = ["torch.distributed.fsdp", "moezoo.parallel", "moezoo.adapters.checkpoint"]
FOLLOWING = 3.0  # seconds that the others have when a rank has failed


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and a folder that all of them see."""

    rank: int
    world: int
    folder: Path


@dataclass
class Claims:
    """What a test file claims, in order, by world size.

    joined: the ranks are in a process group; those of another file join by themselves.
    """

    joined: bool = True
    found: dict[tuple[int, str], Callable[[Ranks], None]] = field(default_factory=dict)

    def over(self, *worlds: int) -> Callable[[Callable[[Ranks], None]], Callable[[Ranks], None]]:
        def add(claim: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
            for world in worlds:
                self.found[world, claim.__name__] = claim
            return claim

        return add

    def names(self) -> list[tuple[int, str]]:
        return list(self.found)


def started(module: str, folder: Path, *, timeout: float = 120.0) -> dict[tuple[int, str], str]:
    """Check all claims of a module; by claim: "", or what went wrong on the rank that noticed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    claims: Claims = importlib.import_module(module).claims
    worlds = sorted({world for world, _ in claims.names()})
    gate = context.Barrier(max(worlds))  # a larger world begins when the smaller one has ended
    processes: list[BaseProcess] = [
        context.Process(
            target=_rank, args=(module, rank, worlds, folder, timeout, gate), daemon=True
        )
        for rank in range(max(worlds))
    ]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running), timeout=6 * timeout) or list(running):
            if running.pop(sentinel).exitcode:  # nobody waits for the others of a failed one
                for other in running.values():
                    other.join(FOLLOWING)
                    other.kill()
    return {key: _outcome(folder, *key) for key in claims.names()}


def _outcome(folder: Path, world: int, name: str) -> str:
    files = [folder / f"{world}-{name}-{rank}.txt" for rank in range(world)]
    texts = [f.read_text() if f.exists() else f"rank {i}: not reached" for i, f in enumerate(files)]
    return "\n".join(text for text in texts if text)


def _rank(
    module: str, rank: int, worlds: list[int], folder: Path, timeout: float, gate: Barrier
) -> None:
    torch.set_num_threads(1)
    claims: Claims = importlib.import_module(module).claims
    for world in worlds:
        gate.wait()
        if rank < world and not _world(claims, Ranks(rank, world, folder), timeout):
            os._exit(1)


def _world(claims: Claims, ranks: Ranks, seconds: float) -> bool:
    store = dist.FileStore(str(ranks.folder / f"store-{ranks.world}"), ranks.world)
    timeout = datetime.timedelta(seconds=seconds)
    if claims.joined:
        dist.init_process_group(
            "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout
        )
    fine = True
    try:
        for (world, name), claim in claims.found.items():
            if world == ranks.world:
                held = _held(claim, ranks, ranks.folder / f"{world}-{name}-{ranks.rank}.txt")
                store.set(f"{name}-{ranks.rank}", str(held))
                everyone = [store.get(f"{name}-{rank}") == b"True" for rank in range(world)]
                if any(everyone) and not all(everyone):
                    return False  # who failed alone is behind the others
                fine = fine and held
        return fine
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _held(claim: Callable[[Ranks], None], ranks: Ranks, note: Path) -> bool:
    try:
        claim(ranks)
    except BaseException:
        note.write_text(f"rank {ranks.rank}: {traceback.format_exc()}")
        return False
    note.write_text("")
    return True


SHAPES = {1: [1], 2: [2], 4: [2, 4]}  # ep by number of ranks: dp1 x ep, and 2 x 2


def lively(dtype: torch.dtype = torch.float64, **overrides: Any) -> nn.Module:
    """A small model whose logits and routing vary, the same on every rank, in training."""
    model = moezoo.build(TINY.replace(**overrides), seed=0, dtype=dtype)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
    return model.train()


@dataclass(frozen=True)
class Batch:
    """Ids (B, L), their mask, and labels; `of` takes a rank's rows, `given` what a model takes."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def of(self, rank: int, world: int) -> Batch:
        each = self.ids.shape[0] // world
        rows = slice(rank * each, (rank + 1) * each)
        return Batch(self.ids[rows], self.mask[rows], self.labels[rows])

    def given(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}


def batch(rows: int = 8, *, padded: bool = False, seed: int = 0) -> Batch:
    """As many labels in each row, so that the mean of the ranks' losses is the joint one."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, TINY.vocab_size, (rows, 7), generator=source)
    labels = torch.randint(2, TINY.vocab_size, (rows, 5), generator=source)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, 7 - row % 4 :] = 0
    return Batch(ids, mask, labels)


def whole_of(tensor: Tensor) -> Tensor:
    """A divided tensor gathered; every rank must call it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    if not theirs.numel():
        return 0.0
    size = float(theirs.detach().abs().max()) or 1.0
    return float((ours - theirs).detach().abs().max()) / size


def gradients_agree(model: nn.Module, alone: nn.Module, *, within: float) -> None:
    """Every gradient of a model over ranks is the one of the model in one process."""
    named = dict(alone.named_parameters())
    found = {name: whole_of(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in named.items() if p.grad is not None}
    for name, grad in found.items():
        assert apart(grad, named[name].grad) < within, (name, apart(grad, named[name].grad))


def meshes(ranks: Ranks) -> list[Any]:
    """The meshes that this number of ranks is tried as."""
    return [mesh(ep, device="cpu") for ep in SHAPES[ranks.world]]
