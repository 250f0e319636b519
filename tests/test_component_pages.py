"""Every registered component has a page with its five parts and all its options."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from moezoo import capacity, experts, losses, routers

DOCS = Path(__file__).parent.parent / "docs"
PARTS = ["Idea", "Equation", "Shapes", "Options", "What it cannot do"]
SIZES = {"d_model", "num_experts", "d_ff"}
COMPONENTS = [
    (kind, name, registry.get(name))
    for kind, registry in (
        ("routers", routers.registry),
        ("capacity", capacity.registry),
        ("experts", experts.registry),
        ("losses", losses.registry),
    )
    for name in registry.names()
    if registry.get(name).__module__.startswith("moezoo.")
]


@pytest.mark.parametrize(("kind", "name", "component"), COMPONENTS, ids=lambda v: str(v))
def test_a_page_has_five_parts_and_names_every_option(
    kind: str, name: str, component: type
) -> None:
    text = (DOCS / kind / f"{name}.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == PARTS
    options = text.split("## Options")[1].split("## What it cannot do")[0]
    for parameter in inspect.signature(component).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and parameter.name not in SIZES:
            assert parameter.name in options, parameter.name


def test_no_page_describes_what_is_not_there() -> None:
    named = {(kind, name) for kind, name, _ in COMPONENTS} | {("experts", "shared")}
    pages = {(p.parent.name, p.stem) for p in DOCS.glob("*/*.md")}
    kinds = {kind for kind, _ in named}
    assert {page for page in pages if page[0] in kinds} == named
