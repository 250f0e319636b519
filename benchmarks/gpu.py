"""Layers, models and decoding on a GPU, next to transformers and to dense networks.

    python -m benchmarks.gpu [--parts ceilings layers backends model decode]

Layers have d_model 768 and d_ff 3,072, drop nothing and compute in bfloat16; runs take turns and
are timed by events of the device, which count what the host is late with too. "graph" is the
forward pass as a CUDA graph, which the host launches at once. The dense network has one expert's
size and the same tokens, so as many products. Models are switch-base-8 with weights of float32
under autocast to bfloat16; decoding has weights of bfloat16. Writes benchmarks/gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moezoo
from benchmarks.gpu_page import page
from benchmarks.layer import HIDDEN, WIDTH, layers, training, without_gradient
from benchmarks.peers import theirs
from benchmarks.tables import save
from moezoo.ops import backends
from moezoo.ops.backends import Choice

SHAPES = ((8, 512), (8, 4096), (8, 16384), (8, 65536), (32, 16384), (128, 16384), (128, 65536))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Runs = dict[str, Callable[[], object]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a GPU that torch can use", file=sys.stderr)
        return 2
    path = options.out.with_suffix(".json")
    record = json.loads(path.read_text()) if path.is_file() else {}
    record = record if record.get("machine") == machine() else {"machine": machine()}
    for part in options.parts:
        torch.manual_seed(0)
        begin = time.perf_counter()
        record[part] = PARTS[part](options.rounds)
        print(f"{part}: {time.perf_counter() - begin:.0f} s", flush=True)
        save(options.out, record, page(record, __doc__ or ""))
    print(options.out.with_suffix(".md").read_text())
    return 0


def machine() -> str:
    """What the numbers were taken on."""
    found = torch.cuda.get_device_properties(0)
    versions = f"torch {torch.__version__.partition('+')[0]}, CUDA {torch.version.cuda}"
    host = f"{os.cpu_count()} CPU cores beside it"
    return f"one {found.name}, {host}, {versions}, {date.today().isoformat()}"


def timed(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run by events of the device, in turns, after three warm-ups each."""
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return times


def waited(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run on the clock of the host, in turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def added_mib(run: Callable[[], object]) -> float:
    """By how many MiB one run raises the memory of the device at its peak."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The run as a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def through(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """The run with this backend for every grouped product."""

    def changed() -> None:
        table = backends.TABLE
        backends.TABLE = (Choice(backend),)
        try:
            run()
        finally:
            backends.TABLE = table

    return changed


def ceilings(rounds: int) -> dict[str, float]:
    """What this card does at its best: products of bfloat16, and bytes read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = timed({"product": lambda: a @ b, "copy": lambda: a.clone()}, rounds)
    best = {name: min(times) for name, times in found.items()}
    return {
        "tflops": 2 * 8192**3 / best["product"] / 1e12,
        "tb_per_s": 2 * a.numel() * 2 / best["copy"] / 1e12,
    }


def measured_layers(rounds: int) -> list[dict[str, Any]]:
    """Forward, and forward + backward, of the shapes."""
    rows = []
    for experts, tokens in SHAPES:
        with torch.device("cuda"):
            layer, peer, dense = (module.bfloat16() for module in layers(experts))
            x = torch.randn(1, tokens, WIDTH, dtype=torch.bfloat16)
        calls = {"moezoo": lambda m=layer, x=x: m(x)[0]}
        calls |= {"transformers": lambda m=peer, x=x: m(x), "dense": lambda m=dense, x=x: m(x)}
        runs: Runs = {name: without_gradient(call) for name, call in calls.items()}
        runs |= {"graph": graphed(runs["moezoo"]), "dense graph": graphed(runs["dense"])}
        rows.append(_row("forward", experts, tokens, runs, rounds))
        runs = _training(calls, {"moezoo": layer, "transformers": peer, "dense": dense}, x)
        runs |= {name: through(name, runs["moezoo"]) for name in ("grouped", "triton")}
        rows.append(_row("training", experts, tokens, runs, rounds))
        print(f"{experts} experts, {tokens} tokens", flush=True)
    return rows


def _training(
    calls: dict[str, Callable[[], Tensor]], modules: dict[str, nn.Module], x: Tensor
) -> Runs:
    grad = torch.randn_like(x)
    x.requires_grad_()
    return {name: training(call, modules[name], x, grad) for name, call in calls.items()}


def _row(mode: str, experts: int, tokens: int, runs: Runs, rounds: int) -> dict[str, Any]:
    memory = {name: added_mib(runs[name]) for name in ("moezoo", "transformers")}
    products = 2 if mode == "forward" else 6
    flops = 2 * products * tokens * WIDTH * HIDDEN
    shape = {"mode": mode, "experts": experts, "tokens": tokens, "flops": flops}
    return {**shape, "s": timed(runs, rounds), "mib": memory}


def measured_backends(rounds: int) -> list[dict[str, Any]]:
    """Forward of a layer by every backend and dtype; "tf32" is float32 with rounded products."""
    rows = []
    for name in ("bfloat16", "float16", "float32", "tf32"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        dtype = DTYPES.get(name, torch.float32)
        for experts, tokens in ((8, 16384), (32, 2048)):
            with torch.device("cuda"):
                layer = layers(experts)[0].to(dtype)
                x = torch.randn(1, tokens, WIDTH, dtype=dtype)
            layer.experts.fused = lambda *_: None  # type: ignore[method-assign]
            run = without_gradient(lambda m=layer, x=x: m(x))
            runs = {backend: through(backend, run) for backend in backends.BACKENDS}
            found = timed(runs, rounds)
            rows.append({"dtype": name, "experts": experts, "tokens": tokens, "s": found})
    torch.set_float32_matmul_precision("highest")
    return rows


@cache
def _models() -> tuple[nn.Module, nn.Module]:
    build = {"seed": 0, "device": "cuda", "capacity": "dropless", "router_losses": {}}
    model = moezoo.build("switch-base-8", **build)
    return model, theirs(model)


def measured_model(rounds: int) -> dict[str, Any]:
    """Forward pass and training step (fused AdamW) of 8 x 512 source and 114 target tokens."""
    model, peer = _models()
    ids = torch.randint(2, 30000, (8, 512), device="cuda")
    labels = torch.randint(2, 30000, (8, 114), device="cuda")

    def forward(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
                module(input_ids=ids, labels=labels)

        return run

    def step(module: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

        def run() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = module(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    sides = {"moezoo": model.eval(), "transformers": peer.eval()}
    found: dict[str, Any] = {"forward": waited({n: forward(m) for n, m in sides.items()}, rounds)}
    steps = {name: step(module.train()) for name, module in sides.items()}
    found["training step"] = waited(steps, rounds)
    found["MiB"] = {name: added_mib(run) for name, run in steps.items()}
    return found


def measured_decoding(rounds: int) -> list[dict[str, Any]]:
    """64 new tokens, greedy or by beams, for sources of 64 tokens."""
    model, _ = _models()
    model = copy.deepcopy(model).bfloat16().eval()
    peer, rows = theirs(model), []
    for batch, beams in ((1, 1), (32, 1), (8, 4)):
        ids = torch.randint(2, 30000, (batch, 64), device="cuda")
        asked = {"max_new_tokens": 64, "min_new_tokens": 64, "num_beams": beams}
        runs = {
            "moezoo": lambda a=asked, i=ids: model.generate(i, **a),
            "transformers": lambda a=asked, i=ids: peer.generate(i, do_sample=False, **a),
        }
        same = (runs["moezoo"]() == runs["transformers"]()).float().mean()
        times = waited(runs, max(rounds // 3, 3))
        rows.append({"batch": batch, "beams": beams, "tokens": 64, "same": float(same), "s": times})
    return rows


PARTS: dict[str, Callable[[int], Any]] = {
    "ceilings": ceilings,
    "layers": measured_layers,
    "backends": measured_backends,
    "model": measured_model,
    "decode": measured_decoding,
}

if __name__ == "__main__":
    sys.exit(main())
