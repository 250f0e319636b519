"""Decoding of switch-base-8 (random weights, float32) next to transformers, on shared weights.

    python benchmarks/decode.py [--tokens 32] [--repeats 7]

Greedy with batch 1 (source 32 and 512) and batch 4 x 256, beam search with 4 beams; the tokens of
both are compared.
"""

from __future__ import annotations

import argparse

import torch
from peers import interleaved, ours, report, theirs

CASES = [(1, 32, 1), (1, 512, 1), (4, 256, 1), (8, 32, 1), (1, 32, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="switch-base-8")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    model = ours(options.model)
    peer = theirs(model)
    print("| what | unit | moezoo: median (min) | transformers: median (min) | ratio |")
    print("|---|---|---|---|---|")
    for batch, length, beams in CASES:
        ids = torch.randint(2, model.config.vocab_size, (batch, length))
        sizes = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
        runs = {
            "moezoo": lambda i=ids, s=sizes, b=beams: model.generate(i, num_beams=b, **s),
            "transformers": lambda i=ids, s=sizes, b=beams: peer.generate(
                input_ids=i, do_sample=False, num_beams=b, **s
            ),
        }
        equal = torch.equal(runs["moezoo"](), runs["transformers"]())
        times = interleaved(runs, repeats=options.repeats)
        search = "greedy" if beams == 1 else f"{beams} beams"
        what = f"{search}, batch {batch} x {length}, {'equal' if equal else 'DIFFERENT'} tokens"
        report(what, times, options.tokens / 1e3, "ms per step")


if __name__ == "__main__":
    main()
