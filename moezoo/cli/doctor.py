"""`moezoo doctor`: what this installation has and lacks."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

REQUIRED = {
    "torch": (2, 10),
    "einops": (0, 8),
    "sentencepiece": (0, 2),
    "safetensors": (0, 5),
    "numpy": (),
}
EXTRAS = {
    "hf": ("transformers", "tokenizers", "accelerate"),
    "report": ("matplotlib",),
    "orbax": ("tensorstore",),
    "train": ("sacrebleu", "rouge-score", "datasets", "tensorboard"),
}
GROUPS = ("moezoo.routers", "moezoo.capacity", "moezoo.experts", "moezoo.losses")
MISSING = 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print one line per fact; exit code 3 when a requirement is not met."""
    from moezoo.cli.terminal import table

    rows = [("python", platform.python_version(), "ok"), *_requirements(), *_extras(), *_machine()]
    rows += [(f"plugin {e.name}", e.value, group) for group in GROUPS for e in _plugins(group)]
    if arguments.json:
        print(
            json.dumps([dict(zip(("what", "found", "verdict"), row, strict=True)) for row in rows])
        )
    else:
        print(table(["what", "found", "verdict"], rows))
    return MISSING if any(verdict.startswith("needs") for _, _, verdict in rows) else 0


def _requirements() -> list[tuple[str, str, str]]:
    rows = []
    for name, least in REQUIRED.items():
        found, wanted = _version(name), ".".join(map(str, least))
        fits = found is not None and _numbers(found) >= least
        rows.append(
            (
                name,
                found or "missing",
                "ok" if fits else f"needs {wanted} or later" if wanted else "needs to be installed",
            )
        )
    return rows


def _extras() -> list[tuple[str, str, str]]:
    rows = []
    for extra, names in EXTRAS.items():
        absent = [name for name in names if _version(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in names if name not in absent)
        lacks = "" if not found else f", lacks {', '.join(absent)}"
        verdict = f"optional{lacks}: pip install '.[{extra}]'" if absent else "ok"
        rows.append((f"extra {extra}", found or "missing", verdict))
    return rows


def _machine() -> list[tuple[str, str, str]]:
    if _version("torch") is None:
        return []
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    grouped = hasattr(torch.nn.functional, "grouped_mm")
    return [
        ("processor cores", str(os.cpu_count()), f"torch uses {torch.get_num_threads()}"),
        ("GPU", gpu, "ok" if gpu != "none" else "runs on the processor"),
        (
            "grouped product",
            "yes" if grouped else "no",
            "ok" if grouped else "experts run in a loop",
        ),
    ]


def _plugins(group: str) -> list[EntryPoint]:
    return list(entry_points(group=group))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    parts = text.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
