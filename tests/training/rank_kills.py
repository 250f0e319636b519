"""Kill -9 ranks of a training run at random moments; every continuation must end as the whole run.

Run: python -m tests.training.rank_kills [COUNT] [--seed SEED]

As tests.training.kills, with two ranks that share every checkpoint and save after every step. One
of them is killed, or both; the other one must end by itself as RankLost. Two others then go on, and
what they end with is compared with a run that nothing stopped, bit by bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from moezoo.errors import MoezooError, RankLost
from moezoo.parallel import guard, join, leave, mesh, shard
from moezoo.training.checkpoints import checkpoints, restore
from moezoo.training.run import run_training
from tests.parallel.runs import RECIPES, model, rows, state, tensors
from tests.training.runs import measurements

RANKS, STEPS = 2, 6
SETTINGS = RECIPES["adamw"]


def main(count: int, seed: int) -> int:
    """Run the trials; the exit code is 1 when any goes wrong."""
    torch.set_num_threads(1)
    draw, started = random.Random(seed), time.perf_counter()
    exact = typed = in_save = 0
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        span = _finish(whole)
        for trial in range(1, count + 1):
            victims = draw.choice([[0], [1], [0, 1]])
            while (codes := _killed(parts, victims, draw.uniform(0, span))) is None:
                shutil.rmtree(parts)  # it ended before its time: another moment
            in_save += any(p.suffix == ".tmp" for p in (parts / "checkpoints").glob("*"))
            typed += (lost := set(codes) <= {RankLost.exit_code})
            _finish(parts)
            exact += (same := _same(parts, whole))
            if not (same and lost):
                print(f"kill {trial} of {victims}: exit {codes}, same {same}", file=sys.stderr)
            shutil.rmtree(parts)
    seconds = time.perf_counter() - started
    print(f"{exact} of {count} continuations bit-exact, {seconds:.0f} s")
    print(f"{typed} of {count} typed errors of who was left; {in_save} kills fell into a save")
    return 0 if exact == typed == count else 1


def _started(directory: Path) -> list[BaseProcess]:
    """Forked ranks: torch is loaded already, so the moments lie in the training alone."""
    context = multiprocessing.get_context("fork")
    store = tempfile.mktemp(dir=directory.parent)
    made = [context.Process(target=_train, args=(r, store, directory)) for r in range(RANKS)]
    for process in made:
        process.start()
    while all(p.is_alive() for p in made) and not (directory / "metrics.jsonl").exists():
        time.sleep(0.001)
    return list(made)


def _train(rank: int, store: str, directory: Path) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the process ends with it
    torch.manual_seed(7)
    where = dist.FileStore(store, RANKS)
    join(store=where, rank=rank, world_size=RANKS, timeout=120.0, heartbeat=20.0)
    try:
        with guard():
            divided = shard(model(dropout_rate=0.1), mesh(RANKS, device="cpu"))
            run_training(divided, rows, SETTINGS, directory, steps=STEPS, save_every=1)
    except MoezooError as error:
        os._exit(error.exit_code)
    leave()
    os._exit(0)


def _finish(directory: Path) -> float:
    """Train to the end; returns the seconds from the first measurement on."""
    processes = _started(directory)
    begun = time.perf_counter()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * RANKS, f"the run ended with {codes}"
    return time.perf_counter() - begun


def _killed(directory: Path, victims: list[int], delay: float) -> list[int] | None:
    """Start a run and kill ranks of it; how the others end. None when it had ended before."""
    processes = _started(directory)
    time.sleep(delay)
    for victim in victims:
        processes[victim].kill()
    for process in processes:
        process.join()
    if any(processes[victim].exitcode != -9 for victim in victims):
        return None
    codes = [p.exitcode or 0 for rank, p in enumerate(processes) if rank not in victims]
    return None if 0 in codes else codes


def _same(one: Path, two: Path) -> bool:
    """Whether two finished runs have the same last checkpoint and the same log, to the bit."""
    found = []
    for directory in (one, two):
        read = state("alone", SETTINGS, dropout_rate=0.1)
        restore(read, checkpoints(directory / "checkpoints")[-1], {}, strict=False)
        found.append((read.step, read.seed, tensors(read)))
    (step, seed, ours), (steps, seeds, theirs) = found
    bits = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    logs = measurements(one) == measurements(two)
    return bits and logs and (step, seed) == (steps, seeds) and step == STEPS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.count, arguments.seed))
