"""Time and peak memory of every router and every policy: routing, dispatch and combine alone.

    python -m benchmarks.components [--tokens 8192] [--width 64] [--experts 8 64 256 2048]

Each row is a router with `dropless`, or `switch` (or `top_k` with k = 2) with a policy, on experts
that return their input. Seconds are the best of several; "scores" is the classifier product and
softmax alone, which every learned router needs; memory is what one call adds at its peak, to be
compared with a (T, E) float32 matrix. Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from moezoo import capacity, routers
from moezoo.experts import Experts
from moezoo.layer import MoE

SLOW_ASSIGNMENT = 256  # BASE beyond so many experts takes minutes


class SameExperts(Experts):
    """Experts that return their rows: what is left is the routing."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.d_model, self.num_experts = d_model, num_experts

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        return slots


def cases() -> list[tuple[str, dict[str, object], dict[str, object]]]:
    """(row name, router, policy)."""
    listed = [(name, {"name": name}, {"name": "dropless"}) for name in routers.names()]
    for name in capacity.names():
        policy: dict[str, object] = {"name": name}
        if name not in ("dropless", "transformers"):
            policy["factor"] = 1.25
        if name == "reroute":
            policy["hops"] = 2
        for router in ({"name": "switch"}, {"name": "top_k", "k": 2}):
            if name != "dropless":
                listed.append((f"{router['name']} + {name}", router, policy))
    return listed


def layer(router: dict[str, object], policy: dict[str, object], options: argparse.Namespace) -> MoE:
    torch.manual_seed(0)
    sizes = {"d_model": options.width, "num_experts": options.expert_count, "vocab_size": 32128}
    if router["name"] == "relu":
        router = router | {"bias": True}
    if router["name"] == "soft":
        router = router | {"slots": max(options.tokens // options.expert_count // 8, 1)}
    made = MoE(
        routers.build(router, **sizes),
        SameExperts(options.width, options.expert_count),
        capacity=capacity.build(policy),
    )
    for parameter in made.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=options.width**-0.5)
    settle(made, options)
    return made.train()


@torch.no_grad()
def settle(made: MoE, options: argparse.Namespace) -> None:
    """Bring routers that adapt to the state that they are trained towards: one pair per token."""
    x = torch.randn(options.tokens, options.width)
    if isinstance(made.router, routers.ExpertThresholdRouter):
        made.router.adapt([made(x)[1]])
    if isinstance(made.router, routers.ReLURouter):
        logits = x @ made.router.classifier.weight.t()
        few = max(logits.numel() // options.expert_count, 1)
        made.router.classifier.bias.fill_(-logits.flatten().topk(few).values[-1])


def measure(run: Callable[[], object], seconds: float = 0.6, most: int = 20) -> tuple[float, float]:
    """Best seconds of a call, and the bytes by which one call raises the process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    run()
    memory = resident("VmHWM") - before
    times, start = [], time.perf_counter()
    while len(times) < most and (len(times) < 3 or time.perf_counter() - start < seconds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times), memory


def resident(what: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if what in x)
    return float(line.split()[1]) * 1024


def one_case(
    router: dict[str, object], policy: dict[str, object], options: argparse.Namespace
) -> tuple[float, float, float]:
    """Seconds without gradient, seconds with backward, peak bytes without gradient."""
    module = layer(router, policy, options)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(options.tokens, options.width, generator=source)
    ids = torch.randint(32128, (options.tokens,), generator=source)

    def forward() -> None:
        with torch.no_grad():
            module(x, token_ids=ids)

    def train() -> None:
        y, _ = module(x.clone().requires_grad_(), token_ids=ids)
        y.sum().backward()

    seconds, memory = measure(forward)
    return seconds, measure(train)[0], memory


def scores(options: argparse.Namespace) -> tuple[float, float, float]:
    """The classifier product and softmax alone."""
    weight = torch.randn(options.expert_count, options.width, requires_grad=True)
    x = torch.randn(options.tokens, options.width)

    def forward() -> None:
        with torch.no_grad():
            (x @ weight.t()).softmax(-1)

    seconds, memory = measure(forward)
    backward = measure(lambda: (x @ weight.t()).softmax(-1)[:, 0].sum().backward())
    return seconds, backward[0], memory


def _child(send: object, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    send.send(work(*arguments))


def apart(work: Callable[..., tuple[float, float, float]], *arguments: object) -> str:
    """A table cell from a process of its own: its peak is nobody else's."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_child, args=(send, work, arguments))
    process.start()
    send.close()
    seconds, training, memory = receive.recv()
    process.join()
    return f"{seconds * 1e3:.1f} / {training * 1e3:.1f} ms, {memory / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256, 2048])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"T = {options.tokens}, D = {options.width}, float32, one thread, torch", torch.__version__
    )
    print("forward / forward and backward, peak memory of forward\n")
    print("| component | " + " | ".join(f"E = {count}" for count in options.experts) + " |")
    print("|---" * (len(options.experts) + 1) + "|")
    rows = [("(T, E) matrix", None), ("scores", None)]
    rows += [(name, (router, policy)) for name, router, policy in cases() if options.only in name]
    for name, parts in rows:
        cells = []
        for count in options.experts:
            options.expert_count = count
            if name == "(T, E) matrix":
                cells.append(f"{options.tokens * count * 4 / 2**20:.1f} MiB")
            elif parts is None:
                cells.append(apart(scores, options))
            elif parts[0]["name"] == "base" and count > SLOW_ASSIGNMENT:
                cells.append("-")
            else:
                cells.append(apart(one_case, *parts, options))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
