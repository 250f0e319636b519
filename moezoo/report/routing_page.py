"""The routing report as tables: of text for the terminal, of HTML for a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from moezoo.report.page import html_table
from moezoo.report.routing import LayerReport, sparkline

HEADER = ("layer", "tokens", "dropped", "MaxVio", "entropy", "confidence", "dead", "load")
_NARROW = 32  # experts that a terminal line shows


def rows(report: Sequence[LayerReport]) -> list[tuple[str, ...]]:
    """One row a layer; entropy as a share of log E, loads as bars (half height: the mean)."""
    return [
        (
            layer.name,
            f"{layer.stats.tokens:,}",
            f"{layer.stats.dropped:.1%}",
            f"{layer.stats.max_violation:.2f}",
            f"{layer.stats.entropy / max(math.log(len(layer.stats.load)), 1e-9):.0%}",
            f"{layer.stats.confidence:.2f}",
            str(len(layer.stats.dead)),
            sparkline(layer.stats.load[:_NARROW])
            + ("..." if len(layer.stats.load) > _NARROW else ""),
        )
        for layer in report
    ]


def advice(report: Sequence[LayerReport]) -> list[str]:
    """What a look at the numbers suggests, one line a finding."""
    said = []
    for layer in report:
        stats, experts = layer.stats, len(layer.stats.load)
        if len(stats.dead) > experts // 8:
            said.append(
                f"{layer.name}: {len(stats.dead)} of {experts} experts get no token. Raise the "
                "load-balance coefficient, or start from router_init='mean_orthogonal'."
            )
        at = layer.dropped_at.get(1.25, 0.0)
        if at > 0.1:
            said.append(
                f"{layer.name}: capacity factor 1.25 would drop {at:.0%} in training. Train with "
                "capacity='dropless', or balance the load first."
            )
    return said


def sections(report: Sequence[LayerReport]) -> list[str]:
    """HTML of every layer: its load as a strip, and each expert's tokens."""
    parts = []
    for layer in report:
        total = max(sum(layer.stats.load), 1)
        parts.append(f"<h2>{escape(layer.name)}</h2>")
        parts.append(_strip([load / total for load in layer.stats.load]))
        if layer.dropped_at:
            header = ("capacity factor", *(f"{factor:g}" for factor in layer.dropped_at))
            dropped = ("would drop", *(f"{share:.1%}" for share in layer.dropped_at.values()))
            parts.append(html_table(header, [dropped]))
        if layer.tokens:
            table = [
                (f"{expert}", f"{layer.stats.load[expert] / total:.1%}", "  ".join(pieces))
                for expert, pieces in enumerate(layer.tokens)
            ]
            header = ("expert", "load", "tokens it is chosen for beyond chance")
            parts.append(html_table(header, table, words=(0, 2)))
    return parts


def _strip(shares: Sequence[float]) -> str:
    """A row of cells, the darker the more tokens; white is none, full colour twice the mean."""
    cells = []
    for expert, share in enumerate(shares):
        depth = min(share * len(shares) / 2, 1.0)
        style = f"background: rgba(208, 69, 90, {depth:.2f})"
        cells.append(f'<span title="expert {expert}: {share:.1%}" style="{style}"></span>')
    return '<div class="strip">' + "".join(cells) + "</div>"
