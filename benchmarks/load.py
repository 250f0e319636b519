"""Loading switch-base-8 (2.5 GB, float32, safetensors) next to transformers.

    python -m benchmarks.load [--rounds 5]

Each round runs one process per side, in turns, on the same directory, whose pages the system still
holds. "load" ends when the model is there; "load and touch" when every weight has been read once,
so that pages that were only mapped count in time and in memory. moezoo reads every weight once to
find NaN and infinity; "unchecked" is `allow_nonfinite=True`, which does not, and neither does
transformers. Imports are not timed. Writes benchmarks/load.json and load.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers import peak_mib
from benchmarks.tables import machine, milliseconds, ratio, save, table

SIDES = ("moezoo", "unchecked", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="switch-base-8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "PATH"))
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        prepare = "import sys, moezoo; moezoo.save(moezoo.build(sys.argv[1], seed=0), sys.argv[2])"
        subprocess.run([sys.executable, "-c", prepare, options.model, str(path)], check=True)
        nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds + 1):  # the first is a warm-up
            for side, found in results.items():
                command = [sys.executable, "-m", "benchmarks.load", "--worker", side, str(path)]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(run.stdout.splitlines()[-1]))
                print(side, found[-1], flush=True)
    kept = {side: found[1:] for side, found in results.items()}
    record = {"machine": machine(), "model": options.model, "bytes": nbytes, "results": kept}
    save(options.out, record, page(record))


def measure(side: str, path: str) -> dict[str, float]:
    """One load in this process: seconds, and MiB on top of what the imports took."""
    if side == "transformers":
        from transformers import SwitchTransformersForConditionalGeneration

        load = SwitchTransformersForConditionalGeneration.from_pretrained
    else:
        from moezoo import load

        load = partial(load, allow_nonfinite=side == "unchecked")
    before = peak_mib()
    start = time.perf_counter()
    model = load(path)
    loaded = time.perf_counter()
    with torch.no_grad():
        total = sum(float(p.sum()) for p in model.parameters())
    touched = time.perf_counter()
    assert total == total, "a weight is not a number"
    return {"load": loaded - start, "touch": touched - start, "mib": peak_mib() - before}


def page(record: dict[str, Any]) -> list[str]:
    """The sections of load.md."""
    rows = []
    for part, what in (("load", "load"), ("touch", "load and touch")):
        times = [[r[part] for r in record["results"][side]] for side in SIDES]
        rows.append(
            [what, *map(milliseconds, times), ratio(times[2], times[0]), ratio(times[2], times[1])]
        )
    weights = record["bytes"] / 2**20
    peaks = [median(r["mib"] for r in record["results"][side]) for side in SIDES]
    memory = [
        ["peak above the imports, MiB", *(f"{p:,.0f}" for p in peaks)],
        ["over the size of the weights", *(f"{p / weights:.2f}" for p in peaks)],
    ]
    head = ["what", *(f"{side}, ms" for side in SIDES)]
    intro = __doc__.split("\n\n")[-1].strip()
    return [
        "# Loading",
        f"`python -m benchmarks.load`, {record['machine']}. {intro}",
        f"{record['model']}, {weights:,.0f} MiB. Times are median (min) in ms; ratios of medians "
        "(of minima), above 1 where moezoo is faster.",
        table([*head, "transformers / moezoo", "transformers / unchecked"], rows),
        table(["memory", *SIDES], memory),
    ]


if __name__ == "__main__":
    main()
