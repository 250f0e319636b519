"""Mutated headers, indexes, configs and containers: each is read, or refused by a MoezooError.

    python -m benchmarks.fuzz_inputs [--inputs 1000000] [--workers 2] [--only gguf]

Each input is a sound tiny T5 whose one file was mutated: bytes flipped, inserted, cut out, repeated
or cut off; in JSON also values, keys and lengths replaced by absurd ones. It is opened, checked
against its config and planned for an upcycling; what a container packs is also read. "untyped" is
any other exception; seconds are the processor's; memory is what the peak of the process grew by.
Exits with 1 when an input was answered in any other way than it should be. Writes
benchmarks/fuzz_inputs.json and fuzz_inputs.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.mutations import (
    Mutation,
    bytes_mutated,
    json_mutated,
    ocdbt_mutated,
    safetensors_mutated,
)
from benchmarks.tables import machine, save, table

MEMORY = Path("/dev/shm")  # inputs are written and read a million times
PART = 10_000  # inputs of one job
LIMIT_S, LIMIT_MIB, HANG_S = 0.5, 50.0, 10.0

# What is mutated: the container of the checkpoint, the file in it, how, and the share of inputs.
TARGETS: dict[str, tuple[str, str, Mutation, int]] = {
    "safetensors header": ("safetensors", "model.safetensors", safetensors_mutated, 25),
    "safetensors index": ("sharded", "model.safetensors.index.json", json_mutated, 10),
    "config.json": ("safetensors", "config.json", json_mutated, 25),
    "PyTorch .bin": ("torch", "pytorch_model.bin", bytes_mutated, 4),
    ".bin index": ("sharded .bin", "pytorch_model.bin.index.json", json_mutated, 4),
    "Flax MessagePack": ("flax", "flax_model.msgpack", bytes_mutated, 10),
    "t5x checkpoint": ("t5x", "checkpoint", bytes_mutated, 7),
    "t5x .zarray": ("t5x", "target.encoder.layers_0.mlp.wi.kernel/.zarray", json_mutated, 4),
    "t5x chunk": ("t5x", "target.encoder.layers_0.mlp.wi.kernel/0.0", bytes_mutated, 1),
    "GGUF": ("gguf Q8_0", "model.gguf", bytes_mutated, 10),
}
# Those of an extra come on top, so that they change no other's count.
TARGETS_OF_EXTRAS: dict[str, tuple[str, str, Mutation, int]] = {
    "orbax _METADATA": ("orbax ocdbt", "_METADATA", json_mutated, 2),
    "orbax manifest": ("orbax ocdbt", "manifest.ocdbt", ocdbt_mutated, 1),
    "orbax zarr.json": (
        "orbax zarr3",
        "target.encoder.layers_0.mlp.wi.kernel/zarr.json",
        json_mutated,
        2,
    ),
}


def main() -> int:
    every = TARGETS | TARGETS_OF_EXTRAS
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=every, nargs="+", default=list(every))
    parser.add_argument("--note", default="", help="a sentence for the page, such as on other load")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    total = sum(share for *_, share in TARGETS.values())
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        jobs: dict[str, list[Future[dict[str, Any]]]] = {}
        for name in options.only:
            count = options.inputs * every[name][3] // total
            parts = [min(PART, count - start) for start in range(0, count, PART)]
            jobs[name] = [
                pool.submit(fuzzed, name, part, f"{options.seed} {name} {number}")
                for number, part in enumerate(parts)
            ]
        rows = [joined([job.result() for job in parts]) for parts in jobs.values()]
    record = {"machine": machine(), "seed": options.seed, "note": options.note, "rows": rows}
    save(options.out, record, page(record))
    print(table(HEAD, [cells(row) for row in rows]))
    for row in rows:
        print(*(f"{row['target']}: {example}" for example in row["examples"]), sep="\n", end="")
    return 0 if all(sound(row) for row in rows) else 1


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from those of its parts."""
    row = dict(parts[0])
    for name in ("inputs", "refused", "accepted", "untyped", "hung", "slow", "seconds"):
        row[name] = sum(part[name] for part in parts)
    for name in ("slowest_s", "added_mib"):
        row[name] = max(part[name] for part in parts)
    row["examples"] = [example for part in parts for example in part["examples"]][:5]
    print("\t".join(cells(row)), flush=True)
    return row


def fuzzed(target: str, count: int, seed: str) -> dict[str, Any]:
    """Mutate one file `count` times and count how the checkpoint was answered."""
    container, file, mutation, _ = (TARGETS | TARGETS_OF_EXTRAS)[target]
    chance = random.Random(seed)
    warnings.simplefilter("ignore")  # a harmless oddity may be warned of; that is an acceptance
    signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        directory = checkpoint(container, Path(folder) / "checkpoint")
        sound_bytes = (directory / file).read_bytes()
        assert answer(directory)[0] == "accepted", f"the sound {target} was refused"
        row: dict[str, Any] = {"target": target, "inputs": count, "examples": [], "slowest_s": 0.0}
        row |= dict.fromkeys(("refused", "accepted", "untyped", "hung", "slow"), 0)
        before = _peak_mib(reset=True)
        started = time.perf_counter()
        for _ in range(count):
            content = mutation(sound_bytes, chance)
            (directory / file).write_bytes(content)
            outcome, seconds, problem = answer(directory)
            row[outcome] += 1
            row["slow"] += seconds > LIMIT_S
            row["slowest_s"] = max(row["slowest_s"], seconds)
            if problem and len(row["examples"]) < 5:
                row["examples"].append(f"{problem} for {content[:2000]!r}")
        row["seconds"] = time.perf_counter() - started
        row["added_mib"] = _peak_mib() - before
    return row


def answer(directory: Path) -> tuple[str, float, str]:
    """How a checkpoint is answered, in how many seconds, and the traceback if it was no answer."""
    from moezoo.adapters.checkpoint_source import open_checkpoint
    from moezoo.adapters.plan import make_plan
    from moezoo.adapters.upcycle.recipe import Recipe
    from moezoo.errors import MoezooError

    outcome, problem = "accepted", ""
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    started = time.process_time()
    try:
        with open_checkpoint(directory) as opened:
            make_plan(opened, Recipe(2, layers="all"))
            if opened.source.kind not in ("safetensors", "torch"):
                for name in opened.source.tensors:
                    opened.source.read(name)
    except MoezooError:
        outcome = "refused"
    except _Hang:
        outcome, problem = "hung", "hung"
    except BaseException:  # noqa: BLE001  # the one place that wants to see them all
        lines = traceback.format_exc().strip().splitlines()
        outcome, problem = "untyped", " | ".join(line.strip() for line in lines[-5:])
    seconds = time.process_time() - started  # other work on the machine is not its fault
    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome, seconds, problem


class _Hang(BaseException):
    """Raised in an answer that takes too long."""


def _hang(*_: object) -> None:
    raise _Hang


def _peak_mib(*, reset: bool = False) -> float:
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def checkpoint(container: str, directory: Path) -> Path:
    """A sound tiny T5 in a container."""
    from safetensors.torch import load_file, save_file

    from tests.conversion.dense import dense_t5
    from tests.conversion.test_containers import CONTAINERS

    sizes = {"d_model": 32, "d_ff": 32, "num_layers": 1, "vocab_size": 8}
    dense = dense_t5(directory.with_name("dense"), **sizes)
    weights = load_file(dense / "model.safetensors")
    directory.mkdir()
    shutil.copy(dense / "config.json", directory)
    if container == "safetensors":
        shutil.copy(dense / "model.safetensors", directory)
    elif container.startswith("sharded"):
        _write_shards(weights, directory, save_file if container == "sharded" else _save_bin)
    else:
        CONTAINERS[container][0](weights, directory)
    return directory


def _write_shards(
    weights: dict[str, Any], directory: Path, write: Callable[[dict[str, Any], Path], object]
) -> None:
    stem, ending = ("pytorch_model", "bin") if write is _save_bin else ("model", "safetensors")
    names = sorted(weights)
    parts = {f"a.{ending}": names[::2], f"b.{ending}": names[1::2]}
    for file, part in parts.items():
        write({name: weights[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def _save_bin(weights: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(weights, path)


HEAD = ["mutated", "inputs", "refused", "accepted", "untyped", "hung", "over 0.5 s", "slowest ms",
        "memory MiB", "inputs/s"]  # fmt: skip


def sound(row: dict[str, Any]) -> bool:
    """Whether every input was answered as it should be."""
    return not (row["untyped"] or row["hung"] or row["slow"] or row["added_mib"] > LIMIT_MIB)


def cells(row: dict[str, Any]) -> list[str]:
    counts = [f"{row[k]:,}" for k in ("inputs", "refused", "accepted", "untyped", "hung", "slow")]
    rest = [f"{row['slowest_s'] * 1e3:.0f}", f"{row['added_mib']:.1f}"]
    return [row["target"], *counts, *rest, f"{row['inputs'] / row['seconds']:,.0f}"]


def page(record: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    intro = (__doc__ or "").strip().split("\n\n")
    total = sum(row["inputs"] for row in record["rows"])
    untyped = sum(row["untyped"] for row in record["rows"])
    return [
        "# Mutated inputs",
        f"`python -m benchmarks.fuzz_inputs`, seed {record['seed']}, {record['machine']}. "
        + record["note"],
        intro[-1],
        f"{total:,} inputs, {untyped} untyped exceptions.",
        table(HEAD, [cells(row) for row in record["rows"]]),
    ]


if __name__ == "__main__":
    sys.exit(main())
