"""The model card of a checkpoint: its README.md, with what a hub reads and how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import moezoo

_FRONT = re.compile(r"\A---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
_SAID = re.compile(
    r"^(license(?:_name|_link)?): *[\"']?([\w.+:/%~-]*[\w+/-])[\"']? *$", re.MULTILINE
)
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)\Z")
_AUTO = {"conditional_generation": "AutoModelForSeq2SeqLM"}
_OURS = ("moezoo", "switch_transformers", "t5", "mt5", "umt5", "longt5")  # which moezoo.load reads
_LONGEST = 1 << 16  # of a source's card, of which the first lines are read


def card(
    title: str,
    rows: Mapping[str, object],
    *,
    sources: Sequence[Path],
    model_type: str,
    task: str,
    relation: str | None = None,
    parts: Iterable[str] = (),
) -> str:
    """A README.md.

    Args:
        rows: what the model is, as a table.
        sources: directories of the checkpoints that it was made from; their licence is its own.
        model_type: of its config.json, which decides how transformers loads it.
        task: "conditional_generation", "model" or "encoder".
        relation: to its base model, as hubs call it: "finetune" or "merge".
        parts: what follows, as Markdown.
    """
    terms = _terms(sources)
    licence = terms.get("license_name", terms.get("license"))
    ours = model_type in _OURS
    library, kind = ("moezoo", "switch-transformers") if ours else ("transformers", model_type)
    front = [f"library_name: {library}", f"tags: [mixture-of-experts, {kind}]"]
    if sources:
        front.append("base_model:")
        front += [f"- {name}" for name in dict.fromkeys(map(named, sources))]
    if relation is not None and sources:
        front.append(f"base_model_relation: {relation}")
    front += [f"{name}: {value}" for name, value in terms.items()]
    table = "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
    body = [f"# {title}", table, _usage(model_type, task), *parts, _law(licence, bool(sources))]
    return "---\n" + "\n".join(front) + "\n---\n\n" + "\n\n".join(body) + "\n"


def _usage(model_type: str, task: str) -> str:
    """How to load the directory, in moezoo and in transformers."""
    if model_type not in _OURS:
        lines = ["from transformers import AutoModelForCausalLM", ""]
        lines.append('model = AutoModelForCausalLM.from_pretrained("DIR")  # of this file')
        return "## Usage\n\n```python\n" + "\n".join(lines) + "\n```"
    auto = _AUTO.get(task, "AutoModel")
    lines = ["import moezoo", "", 'model = moezoo.load("DIR")  # the directory of this file', ""]
    lines.append(f"from transformers import {auto}")
    if model_type == "moezoo":
        lines += ["from moezoo.adapters.hf import register", ""]
        lines.append('register()  # tells the Auto classes what "model_type": "moezoo" is')
    else:
        lines.append("")
    lines.append(f'model = {auto}.from_pretrained("DIR")')
    code = "## Usage\n\n```python\n" + "\n".join(lines) + "\n```"
    command = '\n\n```sh\nmoezoo generate DIR "a text"\n```'
    return code + (command if task == "conditional_generation" else "")


def _law(licence: str | None, made: bool) -> str:
    if licence is not None:
        return f"Licence: {licence}, as the card of the model says that it was made from."
    if made:
        return "Licence: that of the model that it was made from, whose files do not say which."
    return "Licence: yours to choose; say it as `license` above."


def named(directory: Path) -> str:
    """What a hub calls the model in a directory of its cache; else the directory's name."""
    for part in directory.absolute().parts:
        cached = _CACHED.match(part)
        if cached:
            return f"{cached[1]}/{cached[2]}"
    return re.sub(r"[^\w.-]", "-", directory.resolve().name)


def _terms(sources: Sequence[Path]) -> dict[str, str]:
    """The licence that the cards of all sources agree on, with its name and where it stands."""
    found = [_said_terms(source / "README.md") for source in sources]
    return found[0] if found and all(terms == found[0] for terms in found) else {}


def _said_terms(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8") as file:
            front = _FRONT.match(file.read(_LONGEST))
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(_SAID.findall(front[1])) if front else {}


def made_by(files: Iterable[tuple[str, str]], how: str, values: str) -> str:
    """From which files, by name and sha256, and how, with the settings as JSON."""
    hashes = "\n".join(f"- `{name}` sha256 `{value}`" for name, value in files)
    made = f"## How it was made\n\nBy moezoo {moezoo.__version__} from:\n\n{hashes}"
    return f"{made}\n\n{how}:\n\n```json\n{values}\n```"
