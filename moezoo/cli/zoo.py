"""`moezoo zoo`: every component, and which go together."""

from __future__ import annotations

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the components and the tables of their products, from the registries."""
    from moezoo import capacity, experts, losses, routers
    from moezoo.product_table import as_text, loss_products, policy_products

    kinds = {
        "routers": routers.names(),
        "capacity policies": capacity.names(),
        "expert containers": experts.names(),
        "losses": losses.names(),
    }
    if arguments.json:
        products = [
            {
                "router": p.router,
                kind: p.partner,
                "verdict": p.verdict,
                "reason": p.refused or p.leaks,
            }
            for kind, found in (("capacity", policy_products()), ("loss", loss_products()))
            for p in found
        ]
        print(json.dumps({**kinds, "products": products}, indent=2))
        return 0
    for kind, names in kinds.items():
        print(f"{len(names):>3} {kind:<18} {', '.join(names)}")
    print(f"\n{as_text()}", end="")
    return 0
