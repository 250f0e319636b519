"""Where a training step of switch-base-8 goes, in moezoo and in transformers, and its least time.

    python -m benchmarks.floor [--steps 3] [--batch 4] [--source 256] [--target 114]

One step of each library is run operator by operator: the time of each kind of operator, and what
passes between operators (Python, autograd). Then the step's matrix products run alone, with the
same shapes and layouts, three times: each by torch.mm (MKL), by oneDNN and in the transposed form,
whichever is fastest. With the optimizer, which streams memory, this is what no arrangement of the
rest can beat. Writes benchmarks/floor.json and floor.md.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers import ours, theirs
from benchmarks.tables import machine, save, table

KINDS = {
    "matrix products": "mm mm.out bmm bmm.out addmm baddbmm _linear_pointwise mv",
    "optimizer": "_fused_adamw_",
    "random numbers": "random_ bernoulli_ uniform_",
    "copies, casts, zeros": "clone copy_ _to_copy cat zero_ zeros zeros_like new_zeros fill_",
    "embedding, gather, sort": "embedding embedding_dense_backward index_select index index_put "
    "index_add_ gather scatter sort argmax nonzero",
    "softmax and loss": "_softmax softmax _softmax_backward_data _log_softmax nll_loss_forward "
    "_log_softmax_backward_data nll_loss_backward",
}
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
Product = tuple[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in {"steps": 3, "batch": 4, "source": 256, "target": 114}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    model = ours("switch-base-8")
    sides = {"moezoo": model, "transformers": theirs(model)}
    record = {
        "machine": machine(),
        "batch": [options.batch, options.source, options.target],
        "s": {name: measure(side, options) for name, side in sides.items()},
    }
    sections = page(record)
    save(options.out, record, sections)
    print(sections[-1])


def page(record: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    intro = (__doc__ or "").strip().split("\n\n")[-1]
    ours, theirs = record["s"].values()
    rows = [[name, *(f"{s[name] * 1e3:,.0f}" for s in (ours, theirs))] for name in ours]
    batch = "{} x {} source and {} target tokens".format(*record["batch"])
    least = theirs["step"] / ours["products alone + optimizer"]
    return [
        "# Where a training step goes",
        f"`python -m benchmarks.floor`, {record['machine']}. {intro}",
        f"switch-base-8, batch {batch}. A step of moezoo that did nothing but its products and the "
        f"optimizer would be {least:.2f} times as fast as transformers' step here.",
        table(["ms", *record["s"]], rows),
    ]


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step by kind of operator, and of its products alone."""
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = torch.randint(2, vocabulary, (options.batch, options.source))
    labels = torch.randint(2, vocabulary, (options.batch, options.target))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    found = {"step": median(seconds(step) for _ in range(options.steps))}
    watch = Watch()
    with watch:
        whole = seconds(step)
    found |= {kind: watch.times[kind] for kind in (*KINDS, "elementwise and sums")}
    found["between operators"] = whole - sum(watch.times.values())
    found["products alone"] = sum(alone(p) * count for p, count in watch.products.items())
    found["products alone + optimizer"] = found["products alone"] + found["optimizer"]
    model.eval()
    return found


class Watch(TorchDispatchMode):
    """Seconds of operators by kind, and how often each matrix product ran."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, float] = defaultdict(float)
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        kind = _KIND_OF.get(name, "elementwise and sums")
        self.times[kind] += time.perf_counter() - start
        if name in ("mm", "bmm", "_linear_pointwise"):
            left, right = args[:2]
            right = right.mT if name == "_linear_pointwise" else right
            layouts = tuple((tuple(t.shape), t.stride()) for t in (left, right))
            self.products["bmm" if name == "bmm" else "mm", layouts] += 1
        return result


def alone(product: Product) -> float:
    """The fastest seconds of one product, of the ways that there are."""
    name, (left, right) = product
    a, b = _filled(*left), _filled(*right)
    ways: list[Callable[[], Tensor]] = [lambda: torch.matmul(a, b)]
    if name == "mm":
        onednn = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda: torch.mm(b.t(), a.t()))
        ways.append(lambda: onednn(a.contiguous(), b.t(), None, "none", [], None))
    return min(seconds(way) for way in ways for _ in range(3))


def _filled(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(shape, stride).normal_()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
