"""Routing alone, `switch` with `first_come` (factor 1.25), next to transformers' Switch router.

    python -m benchmarks.router [--experts 8 64 256 2048] [--tokens 8192]

"routing" is scores, choice and admission; "top_k" the same by `top_k` with two experts per token;
"streamed" by `streamed_switch`, which holds no score per token and expert; "with dispatch" (of
"routing") also moves the rows to their experts and back (the experts return them as they are);
"scores" is the classifier product and softmax by torch alone, which no such router can do without;
"given the scores" is what a router does after them. The peer's routing is its router module, whose
dispatch is a loop in its experts. Width 768. "forward" is without gradient; "training" is forward
and the gradient of the weights of all pairs and of both router losses. Writes
benchmarks/router.json and router.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tables import added_mib, machine, milliseconds, ratio, samples, save, table
from moezoo.capacity import FirstCome
from moezoo.experts.base import Experts
from moezoo.functional.assign import best_experts, pairs_of, token_choice
from moezoo.functional.gates import gate_logits, gate_probs
from moezoo.functional.losses import load_balance, z_loss
from moezoo.layer import MoE
from moezoo.ops.memory import release_memory
from moezoo.records import Routing, Tokens
from moezoo.routers import StreamedSwitchRouter, SwitchRouter, TopKRouter

WIDTH = 768
RUNS = ("routing", "top_k", "streamed", "with dispatch", "scores", "transformers")
APART = ("switch, given the scores", "top_k, given the scores")


class SameExperts(Experts):
    """Experts that return their rows."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.d_model, self.num_experts = WIDTH, num_experts

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        return slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256, 2048])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, per row")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(options.tokens, WIDTH)
    rows = []
    for count in options.experts:
        layer = MoE(SwitchRouter(WIDTH, count), SameExperts(count), capacity=FirstCome(factor=1.25))
        peer = transformers_router(layer, options.tokens)
        others = {
            name: MoE(router(WIDTH, count), layer.experts, capacity=FirstCome(factor=1.25))
            for name, router in (("top_k", TopKRouter), ("streamed", StreamedSwitchRouter))
        }
        for other in others.values():
            other.router.classifier = layer.router.classifier
        modes = {
            "forward": forward(layer, others, peer, x),
            "training": train(layer, others, peer, x),
        }
        for mode, runs in modes.items():
            times = samples(runs, seconds=options.seconds)
            memory = {name: added_to_nothing_kept(run) for name, run in runs.items()}
            rows.append({"experts": count, "mode": mode, "s": times, "mib": memory})
            print("\t".join(cells(rows[-1])), flush=True)
    record = {"machine": machine(), "tokens": options.tokens, "rows": rows}
    save(options.out, record, page(record))


def added_to_nothing_kept(run: Callable[[], object]) -> float:
    """`added_mib`, where no memory of an earlier run waits to be used again."""
    release_memory()
    return added_mib(run)


def transformers_router(layer: MoE, tokens: int) -> nn.Module:
    """The peer's router on the same classifier, with the same capacity."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs

    count = layer.router.num_experts
    capacity = -(-5 * tokens // (4 * count))
    config = SwitchTransformersConfig(
        d_model=WIDTH, num_experts=count, expert_capacity=capacity, router_jitter_noise=0.0
    )
    peer = theirs.SwitchTransformersTop1Router(config)
    peer.classifier.weight = layer.router.classifier.weight
    return peer


def forward(
    layer: MoE, others: dict[str, MoE], peer: nn.Module, x: Tensor
) -> dict[str, Callable[[], object]]:
    weight = layer.router.classifier.weight

    def quiet(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                call()

        return run

    return {
        "routing": quiet(lambda: layer.route(Tokens(x))),
        "top_k": quiet(lambda: others["top_k"].route(Tokens(x))),
        "streamed": quiet(lambda: others["streamed"].route(Tokens(x))),
        "transformers": quiet(lambda: peer(x[None])),
        "with dispatch": quiet(lambda: layer(x)),
        "scores": quiet(lambda: F.linear(x, weight).softmax(-1)),
        **{name: quiet(run) for name, run in given(layer, x).items()},
    }


def given(layer: MoE, x: Tensor) -> dict[str, Callable[[], object]]:
    """What `switch` and `top_k` do after product and softmax: choice, weights, ranks, admission."""
    tokens, count = Tokens(x), layer.router.num_experts
    with torch.no_grad():
        probs = gate_probs(gate_logits(x, layer.router.classifier.weight))

    def switch() -> None:
        layer.capacity(Routing(token_choice(probs, probs, 1, tokens), probs=probs))

    def top_k() -> None:
        expert_TK = best_experts(probs, 2)
        weight_TK = probs.gather(1, expert_TK)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        layer.capacity(Routing(pairs_of(expert_TK, weight_TK, count, tokens), probs=probs))

    return dict(zip(APART, (switch, top_k), strict=True))


def train(
    layer: MoE, others: dict[str, MoE], peer: nn.Module, x: Tensor
) -> dict[str, Callable[[], object]]:
    weight = layer.router.classifier.weight

    def ours(layer: MoE) -> None:
        routing = layer.route(Tokens(x))
        loss = z_loss(routing.logits) + load_balance(routing.probs, routing.offered)
        (loss + routing.assignment.weight.sum()).backward()
        weight.grad = None

    def streamed() -> None:
        routing = others["streamed"].route(Tokens(x))
        loss = routing.losses["z"] + routing.losses["load_balance"]
        (loss + routing.assignment.weight.sum()).backward()
        weight.grad = None

    def theirs() -> None:
        from transformers.models.switch_transformers import modeling_switch_transformers as module

        mask, gate, logits = peer(x[None])
        z = module.router_z_loss_func(logits)
        balance = module.load_balancing_loss_func(logits.softmax(-1), mask.argmax(-1))
        (z + balance + gate.sum()).backward()
        weight.grad = None

    def moved() -> None:
        y, routing = layer(x)
        loss = z_loss(routing.logits) + load_balance(routing.probs, routing.offered)
        (loss + y.sum()).backward()
        weight.grad = None

    def scores() -> None:
        F.linear(x, weight).softmax(-1).backward(torch.ones(()).expand(x.shape[0], weight.shape[0]))
        weight.grad = None

    return {
        "routing": lambda: ours(layer),
        "top_k": lambda: ours(others["top_k"]),
        "streamed": streamed,
        "transformers": theirs,
        "with dispatch": moved,
        "scores": scores,
    }


def page(record: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    intro = (__doc__ or "").strip().split("\n\n")
    sections = ["# Routing", f"`python -m benchmarks.router`, {record['machine']}. {intro[-1]}"]
    sections.append(
        f"{record['tokens']:,} tokens. Times are medians (minima) in ms, and so are ratios. "
        "MiB: what one call adds at its peak; in brackets the part of logits and probabilities, "
        "which a routing holds."
    )
    head = ["experts", *(f"{name} ms" for name in RUNS), "transformers / routing"]
    head += ["transformers / streamed", "routing / scores", "streamed / scores"]
    head += ["MiB (scores)", "MiB, streamed", "MiB, transformers"]
    for mode in ("forward", "training"):
        rows = [cells(row, record["tokens"]) for row in record["rows"] if row["mode"] == mode]
        sections += [f"## {mode.capitalize()}", table(head, rows)]
    sections += [_APART, table(["experts", *APART], apart_from_scores(record))]
    return [*sections, _LIMITS]


def apart_from_scores(record: dict[str, Any]) -> list[list[str]]:
    """Per number of experts what each router does besides its scores, in ms."""
    return [
        [f"{row['experts']:,}", *(milliseconds(row["s"][name]) for name in APART)]
        for row in record["rows"]
        if row["mode"] == "forward"
    ]


_APART = """## Apart from the scores

Choice, weights, ranks and admission, ms, forward, of scores that are there. At 2,048 experts the
choice reads 64 MiB of probabilities, which takes 2 ms at 32 GB/s: what does not depend on the
number of experts is the row of 8."""

_LIMITS = """## What limits it

The classifier product: at 2,048 experts it takes most of "routing", so that even a router that did
nothing else could be no more than about 3.5 times as fast as the peer here. Choice, ranks and
admission cost the same for 8 and for 2,048 experts but for one pass over the probabilities, for the
maximum of every 64 of them. In training "scores" has no router losses, the others have both."""


def cells(row: dict[str, Any], tokens: int = 8192) -> list[str]:
    s, mib = row["s"], row["mib"]
    held = 2 * 4 * tokens * row["experts"] / 2**20
    return [
        f"{row['experts']:,}",
        *(milliseconds(s[name]) for name in RUNS),
        ratio(s["transformers"], s["routing"]),
        ratio(s["transformers"], s["streamed"]),
        ratio(s["routing"], s["scores"]),
        ratio(s["streamed"], s["scores"]),
        f"{mib['routing']:.0f} ({held:.1f})",
        f"{mib['streamed']:.0f}",
        f"{mib['transformers']:.0f}",
    ]


if __name__ == "__main__":
    main()
