"""kill -9 at random moments of conversions and saves: nothing, or something that can be resumed.

    python -m benchmarks.kills [--kills 1000] [--seed 0]

Three kinds in turns, on a tiny T5: a conversion into a new place, which must leave no target and at
most a `.partial`, from which the next run makes the bytes of a run that nobody killed; a conversion
over an existing target, and `moezoo.save` over an existing checkpoint, which must leave the old or
the new directory, whole, with every byte. "done" ended before the kill came. Exits with 1 when
anything else was found. Writes benchmarks/kills.json and kills.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import moezoo
from benchmarks.tables import machine, save, table
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from tests.conversion.dense import dense_t5

Files = dict[str, bytes]
KINDS = ("new conversion", "conversion over another", "save over another")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        counts = {kind: Counter[str]() for kind in KINDS}
        for number in range(options.kills):
            kind = KINDS[number % len(KINDS)]
            trial = place.fresh if kind == KINDS[0] else place.over
            counts[kind][trial(kind, chance)] += 1
    bad = sum(count["wrong"] for count in counts.values())
    record = {"machine": machine(), "seed": options.seed, "kills": options.kills,
              "counts": {kind: dict(count) for kind, count in counts.items()}}  # fmt: skip
    names = sorted({name for count in counts.values() for name in count} | {"wrong"})
    rows = [[kind, *(f"{counts[kind][name]:,}" for name in names)] for kind in KINDS]
    intro = (__doc__ or "").strip().split("\n\n")[-1]
    command = f"`python -m benchmarks.kills`, seed {options.seed}, {record['machine']}."
    summary = f"{options.kills:,} kills, {bad} left anything else."
    sections = ["# Kills", command, intro, summary, table(["what", *names], rows)]
    save(options.out, record, sections)
    print("\n\n".join(sections))
    return 1 if bad else 0


class Place:
    """A folder with the sources, and what a target holds that nobody disturbed."""

    def __init__(self, folder: Path) -> None:
        self.source = dense_t5(folder / "t5", num_layers=2)
        self.target = folder / "place" / "out"
        dense = moezoo.load(self.source)
        self.models = [dense, moezoo.upcycle(dense, num_experts=2)]
        works = [*(self.conversion(experts) for experts in (2, 3)), *map(self.saving, self.models)]
        self.whole: list[Files] = []
        self.seconds = 0.0
        for work in works:
            started = time.perf_counter()
            work()
            self.seconds = max(self.seconds, time.perf_counter() - started)
            self.whole.append(held(self.target))

    def conversion(self, experts: int) -> Callable[[], object]:
        return lambda: convert(self.source, self.target, Recipe(experts), overwrite=True)

    def saving(self, model: object) -> Callable[[], object]:
        return lambda: moezoo.save(model, self.target, overwrite=True)

    def fresh(self, kind: str, chance: random.Random) -> str:
        """A conversion into nothing; then the same again, which must give the whole bytes."""
        self.clear()
        ended = killed(self.conversion(2), chance.uniform(0.0, 1.5 * self.seconds))
        left = sorted(path.name for path in self.target.parent.iterdir())
        if "out" in left:
            right = held(self.target) == self.whole[0]
            return ("done" if ended else "new") if right else "wrong"
        report = convert(self.source, self.target, Recipe(2))
        right = held(self.target) == self.whole[0] and left in ([], ["out.partial"])
        return ("resumed" if report.resumed else "nothing") if right else "wrong"

    def over(self, kind: str, chance: random.Random) -> str:
        """Writing over a whole target; then it must be whole, the old or the new."""
        first = 0 if kind == KINDS[1] else 2
        works = [self.conversion(2), self.conversion(3), *map(self.saving, self.models)]
        self.clear()
        works[first]()
        ended = killed(works[first + 1], chance.uniform(0.0, 1.5 * self.seconds))
        found = held(self.target)
        works[first]()
        swept = sorted(path.name for path in self.target.parent.iterdir()) == ["out"]
        if not swept or found not in self.whole[first : first + 2]:
            return "wrong"
        return "done" if ended else "old" if found == self.whole[first] else "new"

    def clear(self) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()


def held(directory: Path) -> Files:
    """The bytes of every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def killed(work: Callable[[], object], seconds: float) -> bool:
    """Run `work` in a forked process and kill that after a while; whether it had ended by then."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise RuntimeError("the work failed before it was killed")
    return not os.WIFSIGNALED(status)


if __name__ == "__main__":
    sys.exit(main())
