"""One command as one process: its seconds, peak memory, and bytes read and written. No torch here.

What a child process is said to have held at its peak counts the memory of its parent up to the
moment when it started, so whoever measures with this must stay small.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a process took. Bytes are those of read and write calls (or of copies in the kernel),
    whether or not they came from the cache; pages of mapped files are not in it.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    read: int
    written: int
    output: str

    def to_dict(self) -> dict[str, Any]:
        """What was measured, without the process's words."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


def run(command: Sequence[str]) -> Cost:
    """Run a command to its end. Raises RuntimeError with its words when it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )  # fmt: skip
    assert process.stdout is not None
    output = process.stdout.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - started
    lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()  # gone once it is reaped
    moved = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)[:300]} failed: {output[-2000:]}")
    return Cost(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_mib=usage.ru_maxrss / 1024,
        read=moved["rchar"],
        written=moved["wchar"],
        output=output,
    )
