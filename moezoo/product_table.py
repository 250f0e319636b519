"""The product table: what every router does with every capacity policy and every loss.

Computed from the registries and `pairing`, with the components' default options, plugins included;
`moezoo zoo` prints it and docs/zoo.md holds it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moezoo import capacity, losses, routers
from moezoo.capacity.base import CapacityPolicy
from moezoo.errors import ConfigError
from moezoo.pairing import causality_refusal, loss_refusal, pair_refusal
from moezoo.routers.base import Router

_SIZES = {"d_model": 8, "num_experts": 4, "vocab_size": 16}


@dataclass(frozen=True)
class Product:
    """One router with one partner (a capacity policy or a loss).

    refused: why the two cannot work together, None when they can. leaks: why a decoder may not use
    them (a later token changes an earlier one's output), None when it may; always None for losses.
    """

    router: str
    partner: str
    refused: str | None
    leaks: str | None = None

    @property
    def verdict(self) -> str:
        """ "refused", "not causal" or "works"."""
        if self.refused:
            return "refused"
        return "not causal" if self.leaks else "works"


def policy_products() -> list[Product]:
    """Every registered router with every registered capacity policy."""
    found = []
    for router_name in routers.names():
        for policy_name in capacity.names():
            try:
                router, policy = _router(router_name), capacity.build(policy_name)
            except ConfigError as error:  # a plugin with an option that has no default
                found.append(Product(router_name, policy_name, str(error)))
                continue
            found.append(_product(router_name, router, policy_name, policy))
    return found


def loss_products() -> list[Product]:
    """Every registered router with every registered loss."""
    found = []
    for router_name in routers.names():
        for loss_name in losses.names():
            try:
                loss = losses.build(loss_name)
                refused = loss_refusal(_router(router_name), loss, loss_name)
            except ConfigError as error:
                refused = str(error)
            found.append(Product(router_name, loss_name, refused))
    return found


def as_markdown() -> str:
    """Both tables with their reasons, as docs/zoo.md holds them."""
    policies, loss_table = policy_products(), loss_products()
    parts = [
        "## Properties of the routers",
        _aligned(_properties()),
        "## Routers and capacity policies",
        _table(policies),
        _reasons("Refused", policies, lambda product: product.refused, capacity.registry.get),
        _reasons("Not causal", policies, lambda product: product.leaks, capacity.registry.get),
        "## Routers and losses",
        _table(loss_table),
        _reasons("Refused", loss_table, lambda product: product.refused, losses.registry.get),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_text() -> str:
    """The same for a terminal, without markup."""
    lines = as_markdown().replace("## ", "").replace("`", "").replace("|", " ").splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _router(name: str) -> Router:
    return routers.build(name, **_SIZES)


def _product(router_name: str, router: Router, policy_name: str, policy: CapacityPolicy) -> Product:
    refused = pair_refusal(router, policy)
    leaks = None if refused else causality_refusal(router, policy)
    return Product(router_name, policy_name, refused, leaks)


def _properties() -> list[list[str]]:
    """What each router declares (see `moezoo.routers.base.Router`), by row."""
    head = ["router", "pairs per token", "causal", "logits", "probs", "token ids", "own losses"]
    rows = [head]
    for name in routers.names():
        router = _router(name)
        marks = (router.causal, router.has_logits, router.has_probs, router.needs_token_ids)
        pairs = "soft" if router.soft else str(router.choices or "vary")
        own = ", ".join(sorted(router.own_losses)) or "-"
        rows.append([f"`{name}`", pairs, *("yes" if mark else "no" for mark in marks), own])
    return rows


def _table(products: Sequence[Product]) -> str:
    rows = [["router", *dict.fromkeys(product.partner for product in products)]]
    for router in dict.fromkeys(product.router for product in products):
        verdicts = [product.verdict for product in products if product.router == router]
        rows.append([f"`{router}`", *verdicts])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in plain text too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _reasons(
    title: str,
    products: Sequence[Product],
    reason: Callable[[Product], str | None],
    partner_class: Callable[[str], type],
) -> str:
    """Each kind of reason once, with the pairs that it holds for."""
    pairs: dict[str, dict[str, list[str]]] = {}
    for product in products:
        because = reason(product)
        if because:
            because = because.replace(routers.registry.get(product.router).__name__, "the router")
            because = because.replace(partner_class(product.partner).__name__, "the policy")
            because = because.replace(repr(product.partner) + " ", "")
            pairs.setdefault(because, {}).setdefault(product.router, []).append(product.partner)
    if not pairs:
        return ""
    lines = []
    for because, partners in pairs.items():
        listed = [f"`{router}` with {', '.join(names)}" for router, names in partners.items()]
        lines.append(f"- {because}: {'; '.join(listed)}.")
    return f"{title}:\n\n" + "\n".join(lines)


def rewrite(page: Path) -> None:
    """Replace everything from a page's first second-level heading on by the current tables."""
    head, _, _ = page.read_text().partition("## ")
    page.write_text(head + as_markdown())


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]))
