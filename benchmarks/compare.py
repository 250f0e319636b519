"""An earlier commit and the present tree, side by side in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.compare COMMIT [--only WORD ...] [--seconds 20]

Each row of benchmarks/compare_rows.py runs in two processes, one per tree, which take turns: never
both at once, and who begins alternates. A ratio is the median over all pairs of what the earlier
commit takes over the present tree, so above 1 the present one is faster; other work on the machine
touches both sides of a pair. Seven minutes and 12 GB of memory for all rows; --out PATH writes the
samples to PATH.json and the page to PATH.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.compare_rows import NAMES

ROOT = Path(__file__).parents[1]
LEAST, MOST = 5, 200  # pairs
SIDES = ("earlier", "present")
Samples = dict[str, list[tuple[float, float]]]  # clock and processor seconds, pair by pair


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="rows named so")
    parser.add_argument("--seconds", type=float, default=20.0, help="per row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, Samples] = {}
    with earlier_tree(options.commit) as earlier:
        for name in NAMES:
            if any(word in name for word in options.only):
                rows[name] = measured(name, (earlier, ROOT), options.seconds)
                print(" | ".join(cells(name, rows[name])), flush=True)
    if not rows:
        parser.error(f"no row has that in its name; there are: {'; '.join(NAMES)}")
    if options.out:
        from benchmarks.tables import machine, save  # torch, which both sides do without here

        record = {"machine": machine(), "commit": options.commit, "rows": rows}
        save(options.out, record, page(record))
    return 0


@contextmanager
def earlier_tree(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "tree.tar"
        command = ["git", "-C", str(ROOT), "archive", f"--output={packed}", commit]
        if subprocess.run(command).returncode:
            sys.exit(f"no commit {commit!r} here")
        shutil.unpack_archive(packed, folder, filter="data")
        yield Path(folder).resolve()


def measured(name: str, trees: tuple[Path, Path], seconds: float) -> Samples:
    """Seconds of every run of a row, a list per side; those of one place are a pair."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(tree, name)) for tree in trees]
        for worker in workers:
            worker.run()  # a warm-up
        times: Samples = {side: [] for side in SIDES}
        begin = time.perf_counter()
        for number in range(MOST):
            turns = list(zip(SIDES, workers, strict=True))
            for side, worker in turns if number % 2 else reversed(turns):
                times[side].append(worker.run())
            if number + 1 >= LEAST and time.perf_counter() - begin > seconds:
                break
    return times


class Worker:
    """A process that has a row of one tree at hand, and waits to be told to run it."""

    def __init__(self, tree: Path, name: str) -> None:
        script = ROOT / "benchmarks" / "compare_rows.py"  # the same for both; -P: nothing beside it
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PYTHONPATH": str(tree)}, cwd=tree,
        )  # fmt: skip
        self.tree = tree

    def __enter__(self) -> Worker:
        where = self._line()
        if not Path(where).is_relative_to(self.tree):
            raise RuntimeError(f"moezoo of {self.tree} was asked for, that of {where} came")
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self) -> tuple[float, float]:
        """Seconds of one run: by the clock, and of the processor."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        clock, processor = map(float, self._line().split())
        return clock, processor

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process for {self.tree} ended with {self.process.wait()}")
        return line.strip()


def cells(name: str, times: Samples) -> list[str]:
    clock = {side: [pair[0] for pair in times[side]] for side in SIDES}
    low, middle, high = quantiles(_ratios(times, 0), n=4)
    shown = [f"{median(t) * 1e3:.3g} ({min(t) * 1e3:.3g})" for t in clock.values()]
    least = min(clock["earlier"]) / min(clock["present"])
    verdict = "slower" if high < 1.0 else "faster" if low > 1.0 else "level"
    spread = f"{middle:.3f} ({low:.2f} to {high:.2f})"
    processor = f"{median(_ratios(times, 1)):.3f}"
    return [name, *shown, spread, f"{least:.3f}", processor, str(len(times["present"])), verdict]


def _ratios(times: Samples, kind: int) -> list[float]:
    pairs = zip(times["earlier"], times["present"], strict=True)
    return [earlier[kind] / present[kind] for earlier, present in pairs]


def page(record: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    from benchmarks.tables import table

    words = (__doc__ or "").strip().split("\n\n")[-1]
    head = ["row", "earlier, ms", "present, ms", "earlier / present", "minima"]
    head += ["processor", "pairs", ""]
    return [
        f"# The present tree next to {record['commit']}",
        f"`python -m benchmarks.compare {record['commit']}`, {record['machine']}. {words}",
        "Times are median (min) by the clock; ratios with the middle half of all pairs, of minima, "
        'and of processor time. "slower" and "faster": that half lies on one side of 1.',
        table(head, [cells(name, times) for name, times in record["rows"].items()]),
    ]


if __name__ == "__main__":
    sys.exit(main())
