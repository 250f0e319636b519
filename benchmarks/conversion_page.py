"""The page of benchmarks/conversion.py."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.tables import ratio, table

_NO_TORCH_MIB, _RATIO = 64, 1.25
_COPIES = ("cp, synced", "cp")


def page(record: dict[str, Any], intro: str) -> list[str]:
    """The Markdown sections."""
    started = f"`python -m benchmarks.conversion`, {record['machine']}."
    sections = ["# Conversion", " ".join(filter(None, (started, record["note"]))), intro]
    for name, costs in record["models"].items():
        sections += [f"## {name} to 8 experts", table(_HEAD, _rows(costs)), _verdict(costs)]
    head = ["recipe", "seconds", "peak MiB", "torch", "GB written"]
    rows = [
        [what, f"{c['seconds']:.1f}", f"{c['peak_mib']:.0f}", "yes" if c["torch"] else "no",
         f"{c['size'] / 1e9:.2f}"]
        for what, c in record["variants"].items()
    ]  # fmt: skip
    sections += [
        f"## What each recipe needs ({record['variants_of']})",
        _VARIANTS,
        table(head, rows),
    ]
    head = ["plan of", "seconds: median (min)", "peak MiB", "MB read", "torch"]
    rows = [
        [name, _seconds([c["seconds"] for c in costs]), f"{max(c['peak_mib'] for c in costs):.0f}",
         f"{costs[0]['read'] / 1e6:.1f}",
         "yes" if costs[0]["torch"] else "no"]
        for name, costs in record["plans"].items()
    ]  # fmt: skip
    return [*sections, "## moezoo plan", _PLANS, table(head, rows)]


_HEAD = ["what", "seconds: median (min)", "over cp", "over cp, synced", "CPU s", "peak MiB",
         "GB read", "GB written"]  # fmt: skip
_VARIANTS = """Once each. What needs no arithmetic but a factor goes without torch, and its
memory does not grow with the model; the others hold torch and one layer."""
_PLANS = """64 experts. Most of what is read is Python's own modules. The T5-11B is made of headers
and holes: 45 GB in shards of 5 GB that hold no weights."""


def _rows(costs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    times = {what: [c["seconds"] for c in of] for what, of in costs.items()}
    return [
        [
            what,
            _seconds(times[what]),
            ratio(times[what], times["cp"]),
            ratio(times[what], times["cp, synced"]),
            f"{median(c['cpu_seconds'] for c in of):.2f}",
            f"{max(c['peak_mib'] for c in of):.0f}",
            f"{of[0]['read'] / 1e9:.2f}",
            f"{of[0]['written'] / 1e9:.2f}",
        ]
        for what, of in costs.items()
    ]


def _verdict(costs: dict[str, list[dict[str, Any]]]) -> str:
    ours = median(c["seconds"] for c in costs["moezoo"])
    factors = {what: ours / median(c["seconds"] for c in costs[what]) for what in _COPIES}
    peak = max(c["peak_mib"] for c in costs["moezoo"])
    torch = any(c["torch"] for c in costs["moezoo"])
    found = [
        f"at most {_RATIO} x {what}: {'met' if factor <= _RATIO else 'missed'} ({factor:.2f})"
        for what, factor in factors.items()
    ]
    small = "met" if peak <= _NO_TORCH_MIB else "missed"
    return (
        f"Goals: {'; '.join(found)}; at most {_NO_TORCH_MIB} MiB: {small} ({peak:.0f}). "
        f"torch {'was' if torch else 'was not'} imported."
    )


def _seconds(times: Sequence[float]) -> str:
    return f"{median(times):.2f} ({min(times):.2f})"
