"""A rank that works until another one is lost; started by test_lost.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moezoo.errors import MoezooError, NonFiniteLoss
from moezoo.parallel import guard, join, leave


def work(rank: int, ranks: int, folder: str, how: str) -> None:
    """Meet the others, say so, and reduce for ever; the exit code is that of the error."""
    torch.set_num_threads(1)
    log = Path(folder, f"{rank}.log").open("w")
    os.dup2(log.fileno(), 2)
    sys.stderr = log
    port = int(Path(folder, "port").read_text())
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    try:
        for times in range(3 if how == "again" else 1):
            join(store=store, rank=rank, world_size=ranks, timeout=120.0, heartbeat=1.0)
            _reduce(rank, Path(folder), "end" if times < 2 and how == "again" else how)
            leave()
    except MoezooError as error:
        print(type(error).__name__, error, file=log, flush=True)
        sys.exit(error.exit_code)


def _reduce(rank: int, folder: Path, how: str) -> None:
    value = torch.ones(8)
    for step in range(1, 10**9):
        with guard(step):
            dist.all_reduce(value)
            value /= dist.get_world_size()
            if how == "error" and rank == 1 and step == 3:
                raise NonFiniteLoss("not finite at all")
        if how == "end" and step == 3:
            return
        if step == 3:
            (folder / f"{rank}.begun").touch()
