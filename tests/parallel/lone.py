"""Ranks that work until another one is lost, or a signal comes; started by test_lost.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from moezoo import cli
from moezoo.cli import ranks as verbs
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


def wait(rank: int, ranks: int, folder: str, how: str) -> None:
    """A verb under torchrun whose rank 0 waits for what does not come; the exit code is its own.

    how: "deaf" in a collective, to which rank 1 does not come though it lives; "alone" for the
    store, which is not there.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    sys.stderr = Path(folder, f"{rank}.log").open("w", buffering=1)
    port = Path(folder, "port").read_text() if how == "deaf" else "9"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = map(str, (rank, rank, 2, "127.0.0.1", port))
    os.environ |= dict(zip(names, values, strict=True)) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}

    def verb(arguments: argparse.Namespace) -> int:
        with verbs.joined(arguments):
            Path(folder, f"{rank}.begun").touch()
            while rank:
                time.sleep(0.1)
            dist.all_reduce(torch.ones(8))
        return 0

    flags = dict.fromkeys(("ep", "hybrid", "precision", "timeout", "heartbeat"))
    with patch.multiple(verbs, _MEETING=0.5, _WORKING=0.5):
        if how == "alone":
            Path(folder, f"{rank}.begun").touch()
        os._exit(cli._guarded(verb, argparse.Namespace(**flags, debug=False)))
