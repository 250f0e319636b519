"""Experts on several ranks of one machine: processor time over one process's, and bytes.

    python -m benchmarks.parallel [--rounds 3]

A training step, forward and backward, of a Switch model of 2 + 2 layers of which one in two is
sparse (8 experts, dropless): one process on the joint batch, then 2 and 4 processes with `shard`'s
expert parallelism alone (`expert_parallel`), each on its share of the batch, over gloo. Time is
that of the processors (`time.process_time`, all threads), summed over the ranks, which other work
on the machine disturbs little; on shared cores wall times would say nothing. `rows` are the bytes
that ranks sent to each other for their experts over the least there is (each row once there and
once back, forward and backward), `counts` the rest. Writes benchmarks/parallel.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import moezoo
from benchmarks.tables import machine, ratio, save, table
from moezoo.parallel import expert_parallel, mean_gradients, mesh, traffic

SIZES = {256: 1024, 768: 3072}  # width: that of an expert
WORLDS = ((1, 1), (2, 2), (4, 2), (4, 4))  # ranks, ep
ROWS, LENGTH, STEPS = 16, 128, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--worker", nargs=5, metavar=("STORE", "RANK", "WORLD", "EP", "WIDTH"))
    options = parser.parse_args()
    if options.worker:
        store, *numbers = options.worker
        found = measure(store, *map(int, numbers))
        if found is not None:
            print(json.dumps(found))
        return
    results: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for width in SIZES:
            for world, ep in WORLDS:
                found = together(width, world, ep)
                results.setdefault(f"{width}/{world}/{ep}", []).append(found)
                print(number + 1, width, world, ep, found, flush=True)
    load = round(os.getloadavg()[1])
    record = {"machine": machine(), "load": load, "results": results}
    save(options.out, record, page(record))


def together(width: int, world: int, ep: int) -> dict[str, float]:
    """What the first of `world` processes says of all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.parallel", "--worker", f"{folder}/store"]
        ranks = [
            subprocess.Popen(
                [*command, *map(str, (rank, world, ep, width))], stdout=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        texts = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{world} ranks of width {width} failed")
    found: dict[str, float] = json.loads(texts[0].splitlines()[-1])
    return found


def measure(store: str, rank: int, world: int, ep: int, width: int) -> dict[str, float] | None:
    """Seconds of all ranks per step, and what they sent: on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    model = moezoo.build(config(width), seed=0).train()
    grid = mesh(ep, device="cpu")
    expert_parallel(model, grid)
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (ROWS, LENGTH), generator=source)
    mine = ids[rank * ROWS // world : (rank + 1) * ROWS // world]
    step(model, grid, mine)
    dist.barrier()
    begin = time.process_time()
    with traffic() as sent:
        for _ in range(STEPS):
            least = step(model, grid, mine)
    seconds = time.process_time() - begin
    numbers = torch.tensor([seconds, sent.rows, sent.counts, STEPS * least], dtype=torch.float64)
    dist.all_reduce(numbers)
    dist.destroy_process_group()
    total, rows, counts, least_bytes = numbers.tolist()
    if rank:
        return None
    return {"seconds": total / STEPS, "rows": rows, "counts": counts, "least": least_bytes}


def step(model: torch.nn.Module, grid: Any, ids: torch.Tensor) -> int:
    """A step, and the fewest bytes that this rank's rows must travel."""
    output = model(ids, labels=ids)
    output.loss.backward()
    mean_gradients(model, grid)
    model.zero_grad()
    ep, place = grid["ep"].size(), grid["ep"].get_local_rank()
    away = sum(
        int((routing.assignment.expert // (8 // ep) != place).sum()) for routing in output.routing
    )
    width: int = model.config.d_model
    return 4 * away * width * 4  # there and back, forward and backward, in float32


def config(width: int) -> moezoo.SwitchConfig:
    return moezoo.SwitchConfig(
        vocab_size=1000, d_model=width, d_kv=64, d_ff=SIZES[width], num_heads=width // 64,
        num_layers=2, num_experts=8, capacity="dropless", dropout_rate=0.0,
    )  # fmt: skip


def page(record: dict[str, Any]) -> list[str]:
    """The sections of parallel.md."""
    lines = []
    for width in SIZES:
        alone = [found["seconds"] for found in record["results"][f"{width}/1/1"]]
        for world, ep in WORLDS[1:]:
            samples = record["results"][f"{width}/{world}/{ep}"]
            ours, first = [found["seconds"] for found in samples], samples[0]
            lines.append(
                [
                    f"{width}, {SIZES[width]}",
                    f"{world // ep} x {ep}",
                    f"{1000 * median(alone):,.0f}",
                    f"{1000 * median(ours):,.0f}",
                    ratio(ours, alone),
                    f"{first['rows'] / first['least']:.4f}",
                    f"{first['counts'] / first['rows']:.2%}",
                ]
            )
    head = ["D, F", "dp x ep", "one process, ms", "all ranks, ms", "ranks / one", "rows", "counts"]
    intro = __doc__.split("\n\n")[-1].strip()
    rounds = len(record["results"]["256/1/1"])
    return [
        "# Experts on several ranks",
        f"`python -m benchmarks.parallel`, {record['machine']}. {intro}",
        f"{ROWS} x {LENGTH} source and as many target tokens a step, rounds of {STEPS} steps: "
        f"{rounds}. Times are medians; ratios of medians (of minima). The machine had other work, "
        f"a load average of {record['load']}, which makes more processes dearer.",
        table(head, lines),
    ]


if __name__ == "__main__":
    main()
