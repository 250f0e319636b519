"""Every benchmark, one after another: `python -m benchmarks [NAME ...]`; then the summary.

About an hour on two cores. Each is a program of its own (`python -m benchmarks.layer --help`)
and writes its own table and samples here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

NAMES = ("layer", "router", "components", "model", "decode", "int8", "load", "training")
# When asked for: gigabytes on the disk; operators one by one; an environment of its own; a browser;
# several processes.
APART = (
    "conversion",
    "floor",
    "stacks",
    "report",
    "parallel",
    "experts_interface",
    "sparse_generation",
    "fast_paths",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*NAMES, *APART))}; all of them")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - {*NAMES, *APART})
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join((*NAMES, *APART))}")
    failed = []
    names = options.names or NAMES
    for number, name in enumerate([*names, "summary"], 1):
        print(f"[{number}/{len(names) + 1}] {name}", flush=True)
        begin = time.perf_counter()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            failed.append(name)
        print(f"[{number}/{len(names) + 1}] {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
