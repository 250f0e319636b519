"""A Switch layer (d_model 768, d_ff 3,072, dropless) next to transformers' on the same weights.

    python -m benchmarks.layer [--experts 8 32 128 256] [--tokens 1 16 128 512 2048 8192]

Four runs in turns: the layer, transformers' layer, the layer's own matrix products alone (rows
sorted already, gradients into memory that exists), and a dense network of one expert's size on the
same tokens. "forward" is without gradient; "training" is forward, backward to input and weights,
and letting go of the gradients. Writes benchmarks/layer.json and layer.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tables import added_mib, machine, milliseconds, ratio, samples, save, table
from moezoo.capacity import Dropless
from moezoo.experts import StackedExperts
from moezoo.functional.dispatch import dispatch
from moezoo.layer import MoE
from moezoo.ops.backends import BACKENDS, runs_of
from moezoo.ops.memory import release_memory, stacked_gradient
from moezoo.ops.products import product
from moezoo.records import Tokens
from moezoo.routers import SwitchRouter

WIDTH, HIDDEN = 768, 3072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512, 2048, 8192])
    parser.add_argument("--seconds", type=float, default=1.0, help="at least, per row")
    parser.add_argument("--modes", nargs="+", default=["forward", "training"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    torch.manual_seed(0)
    record = earlier(options)
    rows = record["rows"]
    for count in options.experts:
        layer, peer, dense = layers(count)
        for tokens in options.tokens:
            x = torch.randn(1, tokens, WIDTH)
            for mode in options.modes:
                rows.append(measure(mode, layer, peer, dense, x, options.seconds))
                print(line(rows[-1]), flush=True)
                rows.sort(key=lambda row: (row["experts"], row["tokens"], row["mode"]))
                save(options.out, record, page(record))


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """What this machine measured today of other rows, so that a long run can be taken in parts."""
    path = options.out.with_suffix(".json")
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("machine") != machine():
        return {"machine": machine(), "rows": [], "backends": backends(), "zeros": zeros()}
    asked = (options.experts, options.tokens, options.modes)
    keys = ("experts", "tokens", "mode")
    kept = [
        r for r in record["rows"] if any(r[k] not in a for k, a in zip(keys, asked, strict=True))
    ]
    return {**record, "rows": kept}


def layers(count: int) -> tuple[MoE, nn.Module, nn.Module]:
    """Ours, transformers' on the very same memory, and a dense network."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs

    layer = MoE(
        SwitchRouter(WIDTH, count), StackedExperts(WIDTH, HIDDEN, count), capacity=Dropless()
    )
    config = SwitchTransformersConfig(
        d_model=WIDTH, d_ff=HIDDEN, num_experts=count, expert_capacity=1_000_000, dropout_rate=0.0
    )
    with torch.device("meta"):
        peer = theirs.SwitchTransformersSparseMLP(config)
    peer.router.classifier.weight = nn.Parameter(layer.router.classifier.weight.detach())
    for number, expert in enumerate(peer.experts.values()):
        expert.wi.weight = nn.Parameter(layer.experts.wi.detach()[number])
        expert.wo.weight = nn.Parameter(layer.experts.wo.detach()[number])
    return layer, peer.eval(), theirs.SwitchTransformersDenseActDense(config)  # eval: no jitter


def measure(
    mode: str, layer: MoE, peer: nn.Module, dense: nn.Module, x: Tensor, seconds: float
) -> dict[str, Any]:
    """One row: samples of the four runs, and what the two layers add to the memory."""
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], peer(x), atol=1e-3, rtol=1e-3)
    calls = {"moezoo": lambda: layer(x)[0], "transformers": lambda: peer(x)}
    calls["dense"] = lambda: dense(x)
    modules = {"moezoo": layer, "transformers": peer, "dense": dense}
    if mode == "forward":
        runs = {name: without_gradient(call) for name, call in calls.items()}
    else:
        x.requires_grad_()
        grad = torch.randn_like(x)
        runs = {name: training(call, modules[name], x, grad) for name, call in calls.items()}
    runs["products"] = products(layer, x.detach()[0], training=mode == "training")
    times = samples(runs, seconds=seconds)
    release_memory()  # or what waits from the last round would not count
    memory = {name: added_mib(runs[name]) for name in ("moezoo", "transformers")}
    x.requires_grad_(False)
    experts = layer.experts.num_experts
    return {"experts": experts, "tokens": x.shape[1], "mode": mode, "s": times, "mib": memory}


def without_gradient(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def training(
    call: Callable[[], Tensor], module: nn.Module, x: Tensor, grad: Tensor
) -> Callable[[], object]:
    def run() -> None:
        call().backward(grad)
        module.zero_grad()
        x.grad = None

    return run


def products(layer: MoE, x: Tensor, *, training: bool) -> Callable[[], object]:
    """The products that the layer cannot do without, on rows that are sorted already."""
    with torch.no_grad():
        slots, _ = dispatch(x, layer.router(Tokens(x)).assignment)
    wi, wo = layer.experts.wi.detach(), layer.experts.wo.detach()
    runs = runs_of(slots.counts)
    inner = torch.zeros_like(wi[0])
    outer = torch.zeros_like(wo[0])

    @torch.no_grad()
    def run() -> None:
        for expert, rows in runs:
            hidden = product(slots.x[rows], wi[expert], relu=True)
            y = product(hidden, wo[expert])
            if training:
                torch.mm(y.t(), hidden, out=outer)
                grad = product(y, wo[expert].t())
                torch.mm(grad.t(), slots.x[rows], out=inner)
                product(grad, wi[expert].t())

    return run


def backends() -> list[dict[str, Any]]:
    """Every backend that takes CPU tensors, on 8 experts, float32 and bfloat16, forward."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(8, HIDDEN, WIDTH).to(dtype)
        for rows in (1, 16, 128, 1024):
            x, counts = torch.randn(8 * rows, WIDTH).to(dtype), torch.full((8,), rows)
            runs = {
                name: lambda b=backend, x=x, w=weight, c=counts: b.linear(x, w, c)
                for name, backend in BACKENDS.items()
                if backend.refusal(x, weight) is None
            }
            found.append({"dtype": str(dtype), "rows": rows, "s": samples(runs, most=7)})
    return found


def zeros() -> dict[str, list[float]]:
    """Filling the gradient of 8 experts: fresh memory of three kinds."""
    like = torch.zeros(8, HIDDEN, WIDTH)
    every = range(8)

    def fresh() -> None:
        release_memory()
        stacked_gradient(like.shape, like, every).fill_(1.0)

    runs = {
        "torch.zeros": lambda: torch.zeros(like.shape).fill_(1.0),
        "huge pages, fresh": fresh,
        "huge pages, from the stock": lambda: stacked_gradient(like.shape, like, every).fill_(1.0),
        "memory that exists": lambda: like.fill_(1.0),
    }
    return samples(runs, most=11)


def line(row: dict[str, Any]) -> str:
    parts = {name: f"{median(times) * 1e3:.2f}" for name, times in row["s"].items()}
    speed = ratio(row["s"]["transformers"], row["s"]["moezoo"])
    return f"E {row['experts']} T {row['tokens']} {row['mode']}: {parts} ms, {speed}, {row['mib']}"


def page(record: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    intro = (__doc__ or "").strip().split("\n\n")
    command = "`python -m benchmarks.layer`"
    sections = ["# The sparse layer", f"{command}, {record['machine']}. {intro[-1]}"]
    sections.append(
        "Times are median (min) in ms; ratios of medians (of minima). Above 1 in the column "
        '"transformers / moezoo", moezoo is faster. MiB: what one call adds at its peak.'
    )
    head = ["experts", "tokens", "moezoo ms", "transformers ms", "transformers / moezoo"]
    head += ["moezoo / products", "moezoo / dense", "MiB", "MiB, transformers"]
    for mode in dict.fromkeys(row["mode"] for row in record["rows"]):
        rows = [_cells(row) for row in record["rows"] if row["mode"] == mode]
        sections += [f"## {mode.capitalize()}", table(head, rows)]
    sections += ["## Backends", "8 experts, one 768 x 3,072 product each, ms: the table in "]
    sections[-1] += "`moezoo/ops/backends.py` follows from this."
    names = list(record["backends"][0]["s"])
    cells = [
        [
            r["dtype"].removeprefix("torch."),
            str(r["rows"]),
            *(milliseconds(r["s"][n]) for n in names),
        ]
        for r in record["backends"]
    ]
    sections.append(table(["dtype", "rows per expert", *names], cells))
    sections += ["## Fresh memory", "Filling 75 MB, the gradient of one matrix of 8 experts, ms."]
    cells = [[name, milliseconds(times)] for name, times in record["zeros"].items()]
    sections.append(table(["memory", "ms"], cells))
    return [*sections, _LIMITS]


_LIMITS = """## What limits it

- One token reads the 19 MB of its expert; on top come some forty small operators of routing, whose
  Python code is no longer in the cache after such a read. transformers pays the same.
- Up to some 30 tokens per expert the products wait for the weights of the experts that are hit,
  which a dense network reads once: a factor of up to the number of experts in "moezoo / dense".
- Training on fewer tokens than half of the experts: the gradient is one stacked tensor, fresh and
  zero, of which the system clears what is written; the peer's is one tensor per expert from the
  allocator's stock, and none for experts that were not hit.
- The products themselves: oneDNN's are 1.1 to 2 times as fast as MKL's on this CPU, weight
  gradients (a transposed left side) are MKL's."""


def _cells(row: dict[str, Any]) -> list[str]:
    s, mib = row["s"], row["mib"]
    return [
        str(row["experts"]),
        f"{row['tokens']:,}",
        milliseconds(s["moezoo"]),
        milliseconds(s["transformers"]),
        ratio(s["transformers"], s["moezoo"]),
        ratio(s["moezoo"], s["products"]),
        ratio(s["moezoo"], s["dense"]),
        f"{mib['moezoo']:.0f}",
        f"{mib['transformers']:.0f}",
    ]


if __name__ == "__main__":
    main()
