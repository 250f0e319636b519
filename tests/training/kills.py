"""Kill -9 a training run at random moments; every continuation must end as the whole run does.

Run: python -m tests.training.kills [COUNT] [--seed SEED]

Every trial starts a run in a process of its own, kills it at a random moment between its first
step and its end, goes on in another process, and compares weights, optimizer, random numbers and
measurements with those of a run that nothing stopped, bit by bit.
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
from pathlib import Path

import torch

from tests.training.runs import differences, train

SAVE_EVERY = 2


def main(count: int, seed: int) -> int:
    """Run the trials; the exit code is 1 when any continuation differs."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    started = time.perf_counter()
    exact, in_save, before_first = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        span = _finish(whole)
        for trial in range(1, count + 1):
            while not _killed(parts, draw.uniform(0, span)):
                shutil.rmtree(parts)  # it ended before its time: another moment
            places = os.listdir(parts / "checkpoints") if (parts / "checkpoints").is_dir() else []
            in_save += any(name.endswith(".tmp") for name in places)
            before_first += not any(name.startswith("step-") for name in places)
            _finish(parts)
            wrong = differences(parts, whole)
            exact += not wrong
            if wrong:
                print(f"kill {trial}: differs in {', '.join(wrong)}", file=sys.stderr)
            shutil.rmtree(parts)
    seconds = time.perf_counter() - started
    print(f"{exact} of {count} continuations bit-exact, {seconds:.0f} s")
    print(f"{in_save} kills fell into a save, {before_first} before the first checkpoint")
    return 0 if exact == count else 1


def _process(directory: Path) -> multiprocessing.process.BaseProcess:
    """A forked run: torch is loaded already, so the moments lie in the training alone."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(directory,))
    process.start()
    return process


def _train(directory: Path) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the process ends with it
    train(directory, save_every=SAVE_EVERY)


def _finish(directory: Path) -> float:
    """Train to the end; returns the seconds from the first measurement on."""
    process = _process(directory)
    begun = _begun(process, directory)
    process.join()
    assert process.exitcode == 0, f"the run ended with {process.exitcode}"
    return time.perf_counter() - begun


def _killed(directory: Path, delay: float) -> bool:
    """Start a run and kill it; False when it had ended before."""
    process = _process(directory)
    _begun(process, directory)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -9


def _begun(process: multiprocessing.process.BaseProcess, directory: Path) -> float:
    """When the run opened its log."""
    while process.is_alive() and not (directory / "metrics.jsonl").exists():
        time.sleep(0.001)
    return time.perf_counter()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.count, arguments.seed))
