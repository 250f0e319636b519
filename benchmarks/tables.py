"""What the benchmarks write: a JSON file with every sample, and a Markdown table of it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

Runs = Mapping[str, Callable[[], object]]


def samples(runs: Runs, *, seconds: float = 2.0, most: int = 25) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns after one warm-up each: at least 5 rounds, then until
    `seconds` have passed or there are `most`.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(most):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if number >= 4 and time.perf_counter() - begin > seconds:
            break
    return times


def added_mib(run: Callable[[], object]) -> float:
    """By how many MiB one run raises the memory of this process at its peak (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_mib("VmRSS")
    run()
    return max(_resident_mib("VmHWM") - before, 0.0)


def _resident_mib(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def machine() -> str:
    """The line that says what the numbers were taken on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = named[0].partition(": ")[2] if named else model
    level = torch.backends.cpu.get_cpu_capability()
    release = torch.__version__.partition("+")[0]
    return (
        f"{os.cpu_count()} CPU cores ({model}, {level}), {torch.get_num_threads()} threads, fp32, "
        f"torch {release}, {date.today().isoformat()}"
    )


def milliseconds(times: Sequence[float]) -> str:
    """Median (min), in ms."""
    return f"{median(times) * 1e3:.3g} ({min(times) * 1e3:.3g})"


def ratio(times: Sequence[float], over: Sequence[float]) -> str:
    """How many times `times` takes longer than `over`: of medians (of minima)."""
    return f"{median(times) / median(over):.2f} ({min(times) / min(over):.2f})"


def over_best(times: Mapping[str, Sequence[float]]) -> float:
    """How many times longer than "moezoo" the fastest of all others takes, of medians."""
    best = min(median(values) for name, values in times.items() if name != "moezoo")
    return best / median(times["moezoo"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(path: Path, record: dict[str, Any], sections: Sequence[str]) -> None:
    """Write `path`.json and `path`.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n\n".join(sections) + "\n")
