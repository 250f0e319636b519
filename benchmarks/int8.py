"""switch-base-8 (random weights) with int8 weights, next to float32 and transformers in float32.

    python -m benchmarks.int8 [--tokens 24] [--repeats 5]

All three compute on the same weights, rounded for int8. The error is that of the logits, relative
to float32: |difference| / |logits|; "equal" is the share of greedy tokens that stayed the same.
Writes benchmarks/int8.json and int8.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import moezoo
from benchmarks.peers import ours, theirs
from benchmarks.tables import machine, milliseconds, ratio, samples, save, table
from moezoo.quantization import relative_error

SIDES = ("int8", "float32", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="switch-base-8")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    model = ours(options.model).eval()
    rounded = copy.deepcopy(model)
    done = moezoo.quantize(rounded)
    models = {"int8": rounded, "float32": model, "transformers": theirs(model)}
    rows = [decoding(models, batch, options) for batch in (1, 8)]
    rows += [forward(models, 1, 64, options), forward(models, 4, 256, options)]
    record = {"machine": machine(), "rows": rows, "quantization": str(done)}
    head = ["what", *(f"{side} ms" for side in SIDES), "float32 / int8", "transformers / int8"]
    sections = [
        "# int8 inference",
        f"`python -m benchmarks.int8`, {record['machine']}. " + __doc__.split("\n\n")[-1].strip(),
        "\n".join(f"    {line}" for line in str(done).splitlines()),
        "Times are median (min).",
        table([*head, "error of logits, equal tokens"], [cells(row) for row in rows]),
    ]
    save(options.out, record, sections)


def decoding(
    models: dict[str, nn.Module], batch: int, options: argparse.Namespace
) -> dict[str, object]:
    """Greedy decoding from 32 tokens; times are per step."""
    ids = torch.randint(2, 32000, (batch, 32))
    sizes = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}

    def run(name: str) -> Callable[[], Tensor]:
        if name == "transformers":
            return lambda: models[name].generate(input_ids=ids, do_sample=False, **sizes)
        return lambda: models[name].generate(ids, **sizes)

    runs = {name: run(name) for name in models}
    equal = float((runs["int8"]() == runs["float32"]()).float().mean())
    times = samples(runs, most=options.repeats)
    steps = {name: [t / options.tokens for t in found] for name, found in times.items()}
    return {"what": f"decoding step, batch {batch}", "s": steps, "quality": f"{equal:.0%} equal"}


def forward(
    models: dict[str, nn.Module], batch: int, length: int, options: argparse.Namespace
) -> dict[str, object]:
    ids = torch.randint(2, 32000, (batch, length))
    target = torch.randint(2, 32000, (batch, length // 2))

    def run(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return models[name](input_ids=ids, decoder_input_ids=target).logits

        return call

    runs = {name: run(name) for name in models}
    error = relative_error(runs["float32"](), runs["int8"]())
    what = f"forward, {batch} x {length} + {length // 2}"
    return {"what": what, "s": samples(runs, most=options.repeats), "quality": f"{error:.2%}"}


def cells(row: dict[str, object]) -> list[str]:
    s = row["s"]
    assert isinstance(s, dict)
    speed = [ratio(s[side], s["int8"]) for side in ("float32", "transformers")]
    line = [str(row["what"]), *(milliseconds(s[side]) for side in SIDES), *speed]
    line.append(str(row["quality"]))
    print("\t".join(line), flush=True)
    return line


if __name__ == "__main__":
    main()
