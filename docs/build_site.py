"""The documentation site: pages, API reference from the docstrings, and a gallery that was run.

    python docs/build_site.py build/site

Sources are laid out in a folder of their own, as they lie in the repository, so that links between
them hold and nothing is written beside them. Warnings are errors.
"""

from __future__ import annotations

import importlib
import json
import pydoc_data.topics
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from moezoo.cli import main as moezoo

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
# A page of the reference: its title, the modules whose public names it shows, in this order.
REFERENCE = {
    "layer": ("Layers", "sparse_mlp layer recording traces records"),
    "models": ("Models", "config building presets models models.resizing quantization cost"),
    "components": ("Components", "routers capacity experts losses registry pairing testing"),
    "checkpoints": ("Checkpoints", "adapters.checkpoint adapters.verify tokenizer"),
    "upcycling": ("Upcycling", "adapters.upcycle adapters.upcycle.recipe adapters.upcycle.grow"
                  " adapters.upcycle.shrink adapters.upcycle.merge adapters.upcycle.export"),
    "plug": ("Plug", "adapters.plug adapters.sparse"),
    "transformers": ("transformers", "adapters.hf adapters.transformers"),
    "training": ("Training", "training.run training.recipes training.batches training.tasks"
                 " training.evaluation training.distillation"),
    "parallel": ("Many GPUs", "parallel dispatchers"),
    "errors": ("Errors", "errors"),
}  # fmt: skip
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)")
GALLERY, INDEX = "docs/gallery.md", "docs/index.md"


def build(out: Path) -> int:
    """Lay the sources out beside `out` and run Sphinx; its exit code."""
    source = out.with_name(out.name + "-source")
    for folder in (out, source):
        shutil.rmtree(folder, ignore_errors=True)
    lay_out(source)
    (source / "docs" / "api").mkdir()
    for name, (title, modules) in REFERENCE.items():
        (source / "docs" / "api" / f"{name}.md").write_text(reference_page(title, modules.split()))
    with (source / GALLERY).open("a") as page:
        page.write(gallery())
    with (source / INDEX).open("a") as page:
        page.write(further(source / INDEX))
    options = ["-b", "html", "-W", "--keep-going", "-q", "-c", str(source / "docs")]
    code = sphinx([*options, str(source), str(out)])
    report_page(out)
    start = '<meta http-equiv="refresh" content="0; url=docs/index.html"><title>moezoo</title>'
    (out / "index.html").write_text(f'<!doctype html><html lang="en"><head>{start}</head></html>\n')
    return int(code)


def lay_out(source: Path) -> None:
    """The pages and what they show."""
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", source / "examples")
    (source / "benchmarks").mkdir()
    for pattern in ("*.md", "*.png", "*.json", "*.jsonl", "*.py"):
        for file in (ROOT / "benchmarks").glob(pattern):
            shutil.copy(file, source / "benchmarks")
    for name in PAGES:
        shutil.copy(ROOT / name, source)
    for page in list(source.rglob("*.md")):
        for target in LINK.findall(page.read_text()):
            original = (ROOT / page.relative_to(source).parent / target).resolve()
            wanted = source / original.relative_to(ROOT) if original.is_relative_to(ROOT) else None
            if wanted is not None and original.is_file() and not wanted.exists():
                wanted.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(original, wanted)


def reference_page(title: str, modules: list[str]) -> str:
    """What the docstrings of some modules say."""
    parts = [f"# {title}\n"]
    for module in modules:
        name = f"moezoo.{module}"
        options = ":imported-members:" if shows_others(name) else ""
        body = f".. automodule:: {name}\n   {options}".rstrip()
        parts.append(f"## {name}\n\n```{{eval-rst}}\n{body}\n```\n")
    return "\n".join(parts)


def shows_others(module: str) -> bool:
    """Whether a module's public names are those of others, as its `__all__` says."""
    return hasattr(importlib.import_module(module), "__all__")


def gallery() -> str:
    """Every example with its first lines as text, as it stands in the repository."""
    parts = []
    for example in sorted((ROOT / "examples").glob("[0-9]*.py")):
        title = example.stem.partition("_")[2].replace("_", " ").capitalize()
        code = f"```{{literalinclude}} ../examples/{example.name}\n:language: python\n```\n"
        parts.append(f"\n## {title}\n\n`examples/{example.name}`\n\n{code}")
    return "".join(parts)


def further(index: Path) -> str:
    """Pages that the index has no place for yet: nothing that is written is lost."""
    listed = index.read_text().splitlines()
    pages = sorted(page.stem for page in index.parent.glob("*.md"))
    missing = [name for name in pages if name not in listed and name != index.stem]
    entries = "\n".join(missing)
    return f"\n```{{toctree}}\n:caption: More\n\n{entries}\n```\n" if missing else ""


def report_page(out: Path) -> None:
    """What `moezoo report` says of a small Switch model that has learned for some steps."""
    work = out.with_name(out.name + "-report")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    topics: dict[str, str] = pydoc_data.topics.topics
    (work / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)[:40]))
    fields = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
              "num_layers": 4, "num_experts": 8}  # fmt: skip
    (work / "config.json").write_text(json.dumps(fields))
    text, run = str(work / "text.txt"), str(work / "run")
    steps = ["--steps", "40", "--recipe", "small", "--batch-size", "8", "--input-length", "64"]
    train = ["train", run, "--config", str(work / "config.json"), "--text", text, *steps]
    report = ["report", run, "--text", text, "--batches", "2", "--out", str(out / "report.html")]
    if moezoo(train) or moezoo(report):
        raise SystemExit("the gallery's report was not made")


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve()))
