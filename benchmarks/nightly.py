"""Every property at the depth of the `nightly` profile, 10^5 examples, one after another.

    python -m benchmarks.nightly [WORD ...] [--minutes 50] [--examples 100000] [--list]

A property is one promise of one component (`moezoo.testing`), one promise of layers, whose examples
all allowed products share, or one test of tests/ that draws its input. Each result is a line of
benchmarks/nightly.jsonl; a property that has its line with no failure is not run again, so a run
may be stopped at any time and goes on where it was. WORDs choose properties. Writes
benchmarks/nightly.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

EXAMPLES = 100_000
ROOT = Path(__file__).resolve().parents[1]
Property = tuple[str, Callable[[int], int]]  # its name; a function that returns how many cases ran


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="run the properties whose name has one of them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none after that")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--list", action="store_true", help="name the properties and stop")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    os.environ["HYPOTHESIS_PROFILE"] = "nightly"
    chosen = [
        (name, run)
        for name, run in properties()
        if not options.words or any(word in name for word in options.words)
    ]
    if options.list:
        print("\n".join(name for name, _ in chosen))
        return
    out: Path = options.out.with_suffix(".jsonl")
    done = {r["property"] for r in results(out) if not r["failure"]}
    begin = time.monotonic()
    for name, run in chosen:
        if name in done or time.monotonic() - begin > 60 * options.minutes:
            continue
        result = outcome(name, run, options.examples)
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{result['seconds']:8.1f} s {result['examples']:8,} {name}", flush=True)
        if result["failure"]:
            print(result["failure"], flush=True)
    options.out.with_suffix(".md").write_text(page(results(out), [n for n, _ in properties()]))


def properties() -> Iterator[Property]:
    """All properties, those of the kit first."""
    yield from of_components()
    yield from of_layers()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "hypothesis", "tests"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        if "::" in line:
            yield line, partial(of_test, line)


def of_components() -> Iterator[Property]:
    import moezoo
    from moezoo.testing.experts import experts_promises
    from moezoo.testing.losses import loss_promises
    from moezoo.testing.policies import policy_promises
    from moezoo.testing.routers import router_promises
    from tests.properties import test_components as listed

    found: list[tuple[str, Any]] = []
    for subject in (*moezoo.routers.names(), *listed.ROUTER_OPTIONS):
        found.append((f"router {_said(subject)}", router_promises(subject)))
    for name in moezoo.capacity.names():
        found.append((f"policy {name}", policy_promises(name)))
    for rule in listed.RULES:
        for order in listed.ORDERS:
            policy = partial(listed.first_come, rule=rule, order=order)
            found.append((f"policy first_come rule={rule} order={order}", policy_promises(policy)))
    activations = [{"name": "stacked", "activation": name} for name in listed.ACTIVATIONS]
    for subject in (*moezoo.experts.names(), *activations):
        found.append((f"experts {_said(subject)}", experts_promises(subject)))
    for name in moezoo.losses.names():
        found.append((f"loss {name}", loss_promises(name)))
    for component, promises in found:
        for name in promises.invariants:
            yield f"{component}: {name}", partial(promises.verify_one, name)


def of_layers() -> Iterator[Property]:
    from moezoo.testing.layers import layer_promises
    from tests.properties.test_components import LAYERS, layer

    by_name: dict[str, list[Any]] = {}
    for names in LAYERS:
        promises = layer_promises(partial(layer, **names), label=str(names))
        for name in promises.invariants:
            by_name.setdefault(name, []).append(promises)

    def run(name: str, examples: int) -> int:
        products = by_name[name]
        each = -(-examples // len(products))
        return sum(promises.verify_one(name, each) for promises in products)

    for name in by_name:
        yield f"layers: {name}", partial(run, name)


def of_test(node: str, examples: int) -> int:
    """A test that draws its own input, by pytest in a process of its own; it takes the number of
    examples from the profile.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["--hypothesis-show-statistics", node]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise AssertionError(ran.stdout[-3000:])
    return sum(int(count) for count in re.findall(r"(\d+) passing examples", ran.stdout))


def outcome(name: str, run: Callable[[int], int], examples: int) -> dict[str, Any]:
    """Run a property: what is written down about it."""
    start, count, failure = time.monotonic(), 0, ""
    try:
        count = run(examples)
    except AssertionError as error:
        failure = str(error)
    seconds = round(time.monotonic() - start, 1)
    return {"property": name, "examples": count, "seconds": seconds, "failure": failure}


def results(path: Path) -> list[dict[str, Any]]:
    """What has been written down, the last word on each property."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return list({r["property"]: r for r in map(json.loads, lines)}.values())


def page(found: list[dict[str, Any]], names: list[str]) -> str:
    """The Markdown page."""
    from benchmarks.tables import machine, table

    intro = (__doc__ or "").strip().split("\n\n")
    failed = [r for r in found if r["failure"]]
    examples, seconds = (sum(r[key] for r in found) for key in ("examples", "seconds"))
    summary = (
        f"{len(found)} of {len(names)} properties have been run: {examples:,} examples in "
        f"{seconds / 3600:.1f} hours, beside other work; {len(failed)} failed. Less than 10^5 "
        "examples: no more can be drawn, or so many were asked for."
    )
    rows = [
        [r["property"], f"{r['examples']:,}", f"{r['seconds']:,.0f}", r["failure"] and "FAILED"]
        for r in found
    ]
    rows += [
        [name, "", "", "not run"] for name in names if name not in {r["property"] for r in found}
    ]
    head = ["property", "examples", "seconds", ""]
    title = f"`python -m benchmarks.nightly`, {machine()}. {intro[-1]}"
    return "\n\n".join(["# Depth of every property", title, summary, table(head, rows)]) + "\n"


def _said(subject: str | dict[str, object]) -> str:
    return subject if isinstance(subject, str) else " ".join(map(str, subject.values()))


if __name__ == "__main__":
    main()
