"""The measurements of a run as TensorBoard scalars (extra `train`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo.errors import MissingExtra


def summary_writer() -> Any:
    """torch's writer of event files, untyped there. Raises MissingExtra without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("--tensorboard", "tensorboard", extra="train") from None
    return SummaryWriter


class Board:
    """An event file; what an earlier run wrote past `step` is hidden.

    Raises MissingExtra where tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.writer = summary_writer()(str(folder), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Every number of a line of metrics.jsonl, nested ones as name/part."""
        step = row["step"]
        for name, value in row.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            for part, number in inner:
                if name != "step" and isinstance(number, (int, float)):
                    self.writer.add_scalar(f"{name}/{part}" if part else name, number, step)

    def close(self) -> None:
        """Write what is waiting."""
        self.writer.close()
