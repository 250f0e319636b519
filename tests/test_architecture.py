"""The house stands as docs/architecture.md says: who may import whom, and what nobody may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import FILES, MODULES, ROOT, SOURCES, imports, module_name, parsed, unit

COMPONENTS = {"routers", "capacity", "experts", "losses"}
TORCH_FREE = [
    "moezoo",
    "moezoo.config",
    "moezoo.cost",
    "moezoo.errors",
    "moezoo.layouts",
    "moezoo.presets",
    "moezoo.registry",
    "moezoo.adapters.plan",
    "moezoo.adapters.upcycle.convert",
    "moezoo.adapters.upcycle.stream",
    *(name for name in MODULES if unit(name) == "cli" and not name.endswith("__main__")),
]
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def layers() -> dict[str, int]:
    """Layer by unit, from the table of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", text, re.MULTILINE)
    return {name: int(layer) for layer, units in rows for name in re.findall(r"`(\w+)`", units)}


def test_every_unit_has_a_layer_and_every_layer_is_there() -> None:
    assert set(layers()) == {unit(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_go_up(module: str) -> None:
    order = layers()
    for imported in imports(module):
        if imported == "moezoo":
            continue  # the face: names are looked up when used, so it is below everything
        allowed = order[unit(imported)] <= order[unit(module)]
        assert allowed, f"{module} must not import {imported}: it is on a higher layer"


def test_units_never_import_each_other() -> None:
    edges: dict[str, set[str]] = {}
    for module in MODULES:
        targets = {unit(name) for name in imports(module) if name != "moezoo"}
        edges.setdefault(unit(module), set()).update(targets - {unit(module)})
    assert not in_a_circle(edges)


def test_no_file_imports_itself_by_way_of_others_not_even_when_a_function_runs() -> None:
    assert not in_a_circle({name: set(imports(name)) - {name} for name in FILES})


def test_a_circle_is_found() -> None:
    edges = {"top": {"one"}, "one": {"two"}, "two": {"one", "leaf"}, "leaf": set()}
    assert in_a_circle(edges) == ["one", "two"]


def in_a_circle(edges: dict[str, set[str]]) -> list[str]:
    """What can be reached from itself, and what lies between two such circles."""
    for inward in (False, True):  # take off what leads nowhere, then what nothing leads to
        while edges:
            reached = {target for targets in edges.values() for target in targets}
            ends = set(edges) - reached if inward else {n for n in edges if not edges[n]}
            if not ends:
                break
            edges = {name: edges[name] - ends for name in edges if name not in ends}
    return sorted(edges)


@pytest.mark.parametrize("module", ["moezoo.layer", "moezoo.pairing"])
def test_the_layer_knows_components_only_by_their_base(module: str) -> None:
    for imported in imports(module):
        assert unit(imported) not in COMPONENTS or imported.endswith(".base"), imported


def test_what_promises_to_be_light_imports_neither_torch_nor_numpy() -> None:
    code = (
        f"import sys, importlib\nfor name in {TORCH_FREE!r}:\n    importlib.import_module(name)\n"
    )
    code += "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_building_and_running_a_layer_needs_no_numpy() -> None:
    code = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch, moezoo
layer = moezoo.SparseMLP(8, 16, 4)
assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)
moezoo.build("t5-small", device="meta")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_runs_foreign_code(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in names}, where
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, where
        if ast.unparse(node.func) in ("torch.load", "torch.serialization.load"):
            safe = {k.arg: k.value for k in node.keywords}.get("weights_only")
            assert isinstance(safe, ast.Constant) and safe.value is True, where


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_fit_their_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert _code_lines(node) <= 50, f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            told = any(isinstance(n, ast.Raise) or _warns(n) for n in ast.walk(node))
            broad = caught in ("", "BaseException") or "Exception" in caught.split(".")
            assert told or not broad, f"line {node.lineno}: except {caught}"


PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_submodule_has_the_name_of_what_its_package_holds_or_uses(package: str) -> None:
    """Importing `package.name` sets the attribute `name`, and so overwrites what had it before."""
    inside = {
        name.split(".")[len(package.split("."))] for name in MODULES if _within(name, package)
    }
    tree = parsed(MODULES[package])
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    local = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    local |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
    used = {node.id for node in names} - local
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not inside & (used | defined)


def test_the_adapters_import_as_part_of_the_package_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import adapters"], cwd=ROOT, capture_output=True, text=True
    )
    assert "import moezoo.adapters" in done.stderr.splitlines()[-1]


ASKING = {"is_plain", "is_observed", "is_eager", "is_transformed", "is_plain_gate"}
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FAST_PATHS = PAGE.partition("## Fast paths")[2].partition("\n## ")[0]


def test_the_table_of_fast_paths_holds_all_who_ask_and_nobody_else() -> None:
    asking = {
        (str(path.relative_to(ROOT)).removeprefix("moezoo/"), node.name)
        for path in SOURCES
        if path.name not in ("observed.py", "eager.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and ASKING & _called(node)
    }
    text = FAST_PATHS.replace("\n", " ")
    found = re.findall(r"`([\w/]+\.py)`: (`\w+`(?:, `\w+`)*)", text)
    listed = {(file, name) for file, names in found for name in re.findall(r"\w+", names)}
    assert listed == asking


def test_every_fast_path_names_tests_and_pages_that_exist() -> None:
    rows = [line.split(" | ") for line in FAST_PATHS.splitlines() if line.startswith("| `")]
    assert rows and all(len(row) == 5 for row in rows)
    for *_, buys, held in rows:
        file, _, name = held.strip(" |`").partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), held
        for page in re.findall(r"\]\(\.\./(.*?)\)", buys):
            assert (ROOT / page).is_file(), page
        assert "](" in buys or "not measured alone" in buys or "above" in buys or "below" in buys


def _called(node: ast.AST) -> set[str]:
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


def test_no_file_is_called_after_nothing() -> None:
    vague = {"utils", "util", "common", "misc", "helpers", "helper", "stuff"}
    assert not [name for name in MODULES if vague & set(name.split("."))]


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring apart."""
    first, last = node.body[0], node.end_lineno or node.lineno
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return last - (first.end_lineno or first.lineno)
    return last - first.lineno + 1


def _within(module: str, package: str) -> bool:
    return module.startswith(f"{package}.")


def _warns(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
