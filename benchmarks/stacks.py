"""Upcycling small decoders next to mergekit's `mergekit-moe`, on the same directories.

    python -m benchmarks.stacks [--environment DIR] [--width 512] [--layers 4] [--experts 8]

mergekit gets an environment of its own (made where there is none; torch as constraints.txt pins
it), because it asks for other versions than moezoo is tested with. Each tool turns the same dense
model, made by transformers from random weights, into a sparse one of copies; then transformers
loads both here, in float32, and runs them beside the dense one. What a tool says when it refuses is
kept. Seconds are of one process each, on a machine that may have other work; peak memory is of that
process. Writes benchmarks/stacks.json and stacks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.process import run

ROOT = Path(__file__).parents[1]
TOOLS = ("moezoo", "mergekit")
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64, "rope_theta": 5e5}  # fmt: skip
_WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied, RoPE scaled": (
        "llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    ),
    "Mistral, window of 16": ("mistral", {"sliding_window": 16}),
    "Qwen 2": ("qwen2", {}),
    "Qwen 2, windows in some layers": ("qwen2", _WINDOWS),
    "Qwen 3": ("qwen3", {"head_dim": 64}),
    "Granite": ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "OLMo 2": ("olmo2", {}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "mergekit")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--worker", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    python = environment(options.environment)
    results: dict[str, dict[str, Any]] = {}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            child("dense", name, str(path / "dense"), str(options.width), str(options.layers))
            results[name] = {tool: measured(tool, path, options.experts, python) for tool in TOOLS}
            print(name, json.dumps(results[name]), flush=True)
    write(options, python, results)


def write(options: argparse.Namespace, python: Path, results: dict[str, Any]) -> None:
    """The samples and the page. Only at the end, because a child's peak counts what its parent held
    when it started, and this needs torch.
    """
    from benchmarks.tables import machine, save

    record = {"machine": machine(), "mergekit": package(python, "mergekit"),
              "their_transformers": package(python, "transformers"),
              "transformers": version("transformers"), "width": options.width,
              "layers": options.layers, "experts": options.experts, "results": results}  # fmt: skip
    save(options.out, record, page(record))


def child(*words: str) -> Any:
    """What a process of this file prints last, as JSON: torch stays out of this one."""
    command = [sys.executable, "-m", "benchmarks.stacks", "--worker", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def work(what: str, *words: str) -> None:
    """Make a dense model, or compare two."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if what == "dense":
        name, path, width, layers = words
        dense_model(Path(path), *CASES[name], int(width), int(layers))
        print("null")
    else:
        print(json.dumps(compared(*map(Path, words))))


def environment(folder: Path) -> Path:
    """The interpreter of an environment that has mergekit; made where there is none."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "mergekit-moe").exists():
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        (pin,) = (line for line in lines if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "mergekit", pin], check=True
        )
    return python


def package(python: Path, name: str) -> str:
    """The version of a package in an environment."""
    words = f"from importlib.metadata import version; print(version({name!r}))"
    found = subprocess.run([str(python), "-c", words], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def dense_model(
    path: Path, model_type: str, fields: dict[str, Any], width: int, layers: int
) -> None:
    """A dense decoder of random weights whose text depends on all of them, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": width, "intermediate_size": 3 * width,
             "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
             "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
             "eos_token_id": 2}  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.05)
    model.save_pretrained(path)
    write_tokenizer(path)


def write_tokenizer(path: Path) -> None:
    """A tokenizer of whole words, which mergekit wants to read prompts with."""
    words = {f"w{number}": number for number in range(1021)}
    words |= {"<s>": 1021, "</s>": 1022, "<unk>": 1023}
    model_of_words = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
               "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
               "decoder": None, "model": model_of_words}  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(content))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(kind))


def measured(tool: str, folder: Path, experts: int, python: Path) -> dict[str, Any]:
    """What a tool made of `folder`/dense, or the last line that it said."""
    target = folder / tool
    if tool == "moezoo":
        command = [sys.executable, "-m", "moezoo", "upcycle", str(folder / "dense"), str(target)]
        command += ["--experts", str(experts)]
    else:
        recipe = folder / "mergekit.json"  # JSON is YAML
        recipe.write_text(json.dumps(their_recipe(folder / "dense", experts)))
        command = [str(python.parent / "mergekit-moe"), str(recipe), str(target)]
        command += ["--i-understand-this-is-not-useful-without-training"]
    try:
        cost = run(command)
    except RuntimeError as error:
        words = str(error).partition(" failed: ")[2]
        lines = [line for line in words.splitlines() if line.strip()]
        told = next((line for line in lines if "ERROR" in line or "Error" in line), lines[-1])
        return {"refused": f"refused: {told[:300]}"}
    try:
        return {**cost.to_dict(), **child("compare", str(folder / "dense"), str(target))}
    except subprocess.CalledProcessError as error:
        return {"refused": f"transformers cannot run it: {error.stderr.splitlines()[-1][:300]}"}


def their_recipe(dense: Path, experts: int) -> dict[str, Any]:
    """Copies of one model, routers at random; Qwen2's layout wants a shared expert."""
    config = json.loads((dense / "config.json").read_text())
    expert = {"source_model": str(dense), "positive_prompts": ["w5 w9"]}
    shared = [{**expert, "residual_scale": 0.5}] if config["model_type"] == "qwen2" else []
    recipe = {"base_model": str(dense), "gate_mode": "random", "dtype": "float32"}
    return {
        **recipe,
        "experts": [expert] * experts,
        **({"shared_experts": shared} if shared else {}),
    }


def compared(dense: Path, made: Path) -> dict[str, Any]:
    """Logits and greedy text of what was made, next to the dense model's, both in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    before = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    after, report = AutoModelForCausalLM.from_pretrained(
        made, dtype=torch.float32, output_loading_info=True
    )
    ids = torch.randint(3, 1000, (2, 96), generator=torch.Generator().manual_seed(0))
    expected, found = before(ids).logits, after.eval()(ids).logits
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(ids[:, :32], **options).tolist() for model in (before, after)]
    return {
        "made": after.config.model_type,
        "error": float((found - expected).norm() / expected.norm()),
        "same_text": texts[0] == texts[1],
        "missing": len(report["missing_keys"]),
        "unexpected": len(report["unexpected_keys"]),
        "bytes": sum(f.stat().st_size for f in made.glob("*.safetensors")),
    }


def page(record: dict[str, Any]) -> list[str]:
    """The page of a record."""
    from benchmarks.tables import table

    rows = []
    for case, tools in record["results"].items():
        for tool, found in tools.items():
            rows.append([case, tool, *(_refused(found) if "refused" in found else _row(found))])
    head = ["dense", "tool", "becomes", "logit error", "greedy text", "missing, unexpected keys",
            "seconds", "processor seconds", "peak MiB"]  # fmt: skip
    return [
        "# Decoders next to mergekit",
        f"`python -m benchmarks.stacks`: {record['experts']} copies in every layer of a model of "
        f"{record['layers']} layers and width {record['width']}, float32, random weights. mergekit "
        f"{record['mergekit']} with transformers {record['their_transformers']} in its own "
        f"environment; both results are loaded by transformers {record['transformers']}. "
        f"{record['machine']}; the machine had other work, so that seconds say little.",
        table(head, rows),
    ]


def _row(found: dict[str, Any]) -> list[str]:
    return [
        found["made"],
        f"{found['error']:.1e}",
        "the same" if found["same_text"] else "another",
        f"{found['missing']}, {found['unexpected']}",
        f"{found['seconds']:.1f}",
        f"{found['cpu_seconds']:.1f}",
        f"{found['peak_mib']:.0f}",
    ]


def _refused(found: dict[str, Any]) -> list[str]:
    return [found["refused"].replace("|", "/"), *["-"] * 6]


if __name__ == "__main__":
    main()
