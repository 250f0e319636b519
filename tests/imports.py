"""Who imports whom, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "moezoo").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])


def module_name(path: Path) -> str:
    """The name that a source file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "moezoo" else ("moezoo", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}
BENCHMARKS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
}
FILES = MODULES | BENCHMARKS
_OURS = ("moezoo", "benchmarks")


def unit(module: str) -> str:
    """The room that a module belongs to: "moezoo.routers.switch" is in "routers"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(module: str) -> Iterator[str]:
    """Modules of this project that a module imports anywhere, but for type checking alone."""
    for node in _running(parsed(FILES[module])):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in _OURS)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: relative import"
            if (node.module or "").split(".")[0] in _OURS:
                yield from (_target(str(node.module), alias.name) for alias in node.names)


def _target(module: str, name: str) -> str:
    return f"{module}.{name}" if f"{module}.{name}" in FILES else module


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _running(child)
