"""Upcycling a checkpoint on disk: moezoo next to `cp` of the result and to the usual script.

    python -m benchmarks.conversion [--models t5-small t5-base] [--rounds 5] [--folder /tmp]

Sources are T5s of random fp32 weights; 8 experts in every other layer. Each round runs every
contender once, in a process of its own, into a fresh directory, after what was written before has
reached the disk. "moezoo" is the command as it is: it hashes the source, looks for NaN in every
weight, and commits when all of it is on the disk. "cp, synced" copies moezoo's output, which the
system's cache holds, and waits for the disk too, which is the goal's measure; "cp" leaves its
output in the cache, where a power cut takes it. "through the cache" is moezoo with
MOEZOO_DIRECT_IO=0. "the disk alone" writes zeros of the same size past the cache, two writes of 1
MiB at a time, and does nothing else: no durable copy can be faster here. The usual script holds
both models of transformers in memory, copies the MLPs and calls save_pretrained. Python's modules
are compiled beforehand, as pip leaves them. Peak is that of resident memory. Bytes are those of
read and write calls; what the script maps is not in them. Writes benchmarks/conversion.json and
conversion.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.process import Cost, run

SIZES: dict[str, dict[str, int]] = {
    "t5-small": {},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
HUGE = {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128,
        "vocab_size": 32128, "feed_forward_proj": "relu"}  # fmt: skip
VARIANTS = {
    "copy, router normal": [],
    "copy, router zero": ["--router-init", "zero"],
    "copy, shards of 200 MB": ["--max-shard-size", "200MB"],
    "copy, 6 experts (factor 6)": ["--experts", "6"],
    "split": ["--init", "split"],
    "virtual_group:2": ["--init", "virtual_group:2"],
    "noise:1e-3": ["--init", "noise:1e-3"],
    "drop:0.5": ["--init", "drop:0.5"],
    "lora:8": ["--init", "lora:8"],
    "copy, to bfloat16": ["--dtype", "bfloat16"],
}
CACHED = """
import os
os.environ["MOEZOO_DIRECT_IO"] = "0"
"""
ALONE = """
import mmap, os, sys
from concurrent.futures import ThreadPoolExecutor
size, piece = int(sys.argv[2]), mmap.mmap(-1, 1 << 20)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT)
os.posix_fallocate(file, 0, size)
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda at: os.pwrite(file, piece, at), range(0, size, len(piece))))
os.fsync(file)
"""
MOEZOO = """
import sys
from moezoo.cli import main
code = main(sys.argv[1:])
print("torch" in sys.modules)
sys.exit(code)
"""
MAKE = """
import json, sys, torch, transformers
torch.manual_seed(0)
config = transformers.T5Config(**json.loads(sys.argv[1]))
transformers.T5ForConditionalGeneration(config).save_pretrained(sys.argv[2])
"""
SCRIPT = """
import re, sys, torch, transformers
dense = transformers.T5ForConditionalGeneration.from_pretrained(sys.argv[1])
values = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "dtype")}
config = transformers.SwitchTransformersConfig(**{**values, "num_experts": 8,
    "num_sparse_encoder_layers": values["num_layers"] // 2,
    "num_sparse_decoder_layers": values["num_decoder_layers"] // 2})
sparse = transformers.SwitchTransformersForConditionalGeneration(config)
old, new = dense.state_dict(), sparse.state_dict()
with torch.no_grad():
    for name, tensor in new.items():
        shared = re.sub("experts[.]expert_[0-9]+[.]", "", name)
        theirs = shared.replace(".mlp.", ".DenseReluDense.")
        if theirs in old:
            tensor.copy_(old[theirs])
sparse.save_pretrained(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", choices=SIZES, default="t5-base")
    parser.add_argument("--folder", type=Path, help="where to work; needs 9 GB")
    parser.add_argument("--note", default="", help="a sentence for the page, such as on other load")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    record: dict[str, Any] = {"models": {}, "note": options.note, "variants_of": options.variants}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        for name in {*options.models, options.variants}:
            made(name, folder)
        for name in options.models:
            record["models"][name] = contest(folder, name, options.rounds)
        record["variants"] = variants(folder, options.variants)
        record["plans"] = plans(folder, options.models, options.rounds)
    # Not before: tables imports torch, and see benchmarks.process on what a parent weighs.
    from benchmarks.conversion_page import page
    from benchmarks.tables import machine, save

    record["machine"] = machine()
    sections = page(record, (__doc__ or "").strip().split("\n\n")[-1])
    save(options.out, record, sections)
    print("\n\n".join(sections))


def made(name: str, folder: Path) -> None:
    """The source `name`, written by transformers."""
    run([sys.executable, "-c", MAKE, json.dumps(SIZES[name]), str(folder / name)])


def upcycle(source: Path, out: Path, more: list[str], before: str = "") -> Cost:
    arguments = ["upcycle", str(source), str(out), "--experts", "8", *more]
    return run([sys.executable, "-c", before + MOEZOO, *arguments])


def measured(cost: Cost) -> dict[str, Any]:
    """What a process took, and whether it imported torch, the last of moezoo's words here."""
    return {**cost.to_dict(), "torch": cost.output.strip().endswith("True")}


def contest(folder: Path, name: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every contender once per round, in turns."""
    source, out, copy = folder / name, folder / "out", folder / "copy"
    upcycle(source, folder / "reference", [])  # and compiles the modules
    run(["sh", "-c", f"cat '{folder / 'reference'}'/* > /dev/null"])  # into the cache
    size = str((folder / "reference" / "model.safetensors").stat().st_size)
    contenders = {
        "cp": lambda: run(["cp", "-r", str(folder / "reference"), str(copy)]),
        "cp, synced": lambda: run(
            ["sh", "-c", f"cp -r '{folder / 'reference'}' '{copy}' && sync '{copy}'/*"]
        ),
        "moezoo": lambda: upcycle(source, out, []),
        "through the cache": lambda: upcycle(source, out, [], CACHED),
        "the disk alone": lambda: run([sys.executable, "-c", ALONE, str(copy), size]),
        "the usual script": lambda: run([sys.executable, "-c", SCRIPT, str(source), str(out)]),
    }
    costs: dict[str, list[dict[str, Any]]] = {what: [] for what in contenders}
    for number in range(rounds):
        for what, contender in contenders.items():
            if what == "the usual script" and number >= 3:
                continue  # thirty times as long as the others
            os.sync()
            costs[what].append(measured(contender()))
            print(name, what, f"{costs[what][-1]['seconds']:.2f} s", flush=True)
            for path in (out, copy):
                shutil.rmtree(path, ignore_errors=True)
            copy.unlink(missing_ok=True)
    shutil.rmtree(folder / "reference")
    return costs


def variants(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Each initialisation once: what it needs, not how fast it is."""
    costs = {}
    for what, more in VARIANTS.items():
        os.sync()
        cost = upcycle(folder / name, folder / "out", more)
        written = sum(path.stat().st_size for path in (folder / "out").iterdir())
        costs[what] = {**measured(cost), "size": written}
        print(name, what, f"{cost.seconds:.2f} s, {cost.peak_mib:.0f} MiB")
        shutil.rmtree(folder / "out")
    return costs


def plans(folder: Path, names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """`moezoo plan` of the sources, and of T5-11B in shards that hold headers and holes alone."""
    run([sys.executable, "-c", _FABRICATE, str(folder / "t5-11b, sharded"), json.dumps(HUGE)])
    costs: dict[str, list[dict[str, Any]]] = {}
    for name in [*names, "t5-11b, sharded"]:
        command = [sys.executable, "-c", MOEZOO, "plan", str(folder / name), "--experts", "64"]
        costs[name] = [measured(run(command)) for _ in range(max(rounds, 3))]
        print(name, "plan", f"{median(cost['seconds'] for cost in costs[name]):.2f} s")
    return costs


_FABRICATE = """
import json, os, sys
from pathlib import Path
from moezoo.adapters.families import layout_for
from moezoo.adapters.names import disk_names
from moezoo.adapters.shapes import parameter_shapes
from moezoo.adapters.tensor_files import TensorPlan, header, shard, shard_index
from moezoo.config import SwitchConfig
folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
config = SwitchConfig(**sizes, num_experts=0)
family = layout_for(config)
shapes = parameter_shapes(config, "conditional_generation")
tensors = [TensorPlan(disk_names(name, mlp=family.mlp)[0], "F32", shape)
           for name, shape in shapes.items()]
shards = shard(tensors, "5GB")
folder.mkdir()
for name, group in shards.items():
    start = header(group, {"format": "pt"})
    with (folder / name).open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(tensor.nbytes for tensor in group))
(folder / "model.safetensors.index.json").write_bytes(shard_index(shards))
values = family.write(config, "conditional_generation")
(folder / "config.json").write_text(json.dumps(values))
"""


if __name__ == "__main__":
    main()
