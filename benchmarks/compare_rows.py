"""What benchmarks/compare.py runs, in a process that imports moezoo from whichever tree it is told.

It knows moezoo by what both trees have: the names that `import moezoo` gives.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

WIDTH, HIDDEN = 768, 3072
Run = Callable[[], object]


def layer(experts: int, tokens: int, *, training: bool) -> Run:
    import moezoo

    torch = _torch()
    made = moezoo.SparseMLP(WIDTH, HIDDEN, num_experts=experts, capacity="dropless")
    made.train(training)
    x = torch.randn(1, tokens, WIDTH, requires_grad=training)
    grad = torch.randn(1, tokens, WIDTH)
    times = max(min(64 // tokens, 16), 1)  # a run of a millisecond would be one of the clock

    def forward() -> None:
        with torch.no_grad():
            for _ in range(times):
                made(x)

    def both() -> None:
        for _ in range(times):
            y = made(x)
            (y if isinstance(y, torch.Tensor) else y[0]).backward(grad)
            made.zero_grad()
            x.grad = None

    return both if training else forward


def router(experts: int) -> Run:
    from moezoo import routers
    from moezoo.records import Tokens

    torch = _torch()
    made = routers.build("switch", d_model=WIDTH, num_experts=experts).eval()
    tokens = Tokens(torch.randn(8192, WIDTH))
    run: Run = torch.no_grad()(lambda: made(tokens))
    return run


def decode(batch: int, source: int, beams: int = 1) -> Run:
    model, torch = _model().eval(), _torch()
    ids = torch.randint(2, 32000, (batch, source))
    return lambda: model.generate(ids, num_beams=beams, max_new_tokens=32, min_new_tokens=32)


def model(*, training: bool) -> Run:
    made, torch = _model().train(training), _torch()
    ids, labels = torch.randint(2, 32000, (4, 256)), torch.randint(2, 32000, (4, 114))

    def forward() -> None:
        with torch.no_grad():
            made(input_ids=ids, labels=labels)

    def both() -> None:
        made(input_ids=ids, labels=labels).loss.backward()
        made.zero_grad()

    return both if training else forward


def _model() -> Any:
    import moezoo

    return moezoo.build("switch-base-8", seed=0, capacity="dropless", router_losses={})


def _torch() -> Any:
    import torch

    return torch


SIZES = ((8, 1), (8, 128), (8, 2048), (128, 512))
ROWS: dict[str, Callable[[], Run]] = {
    f"layer, {experts} experts, {tokens:,} tokens, {'training' if training else 'forward'}": (
        lambda e=experts, t=tokens, g=training: layer(e, t, training=g)
    )
    for experts, tokens in SIZES
    for training in (False, True)
}
ROWS["router, 2,048 experts, 8,192 tokens"] = lambda: router(2048)
ROWS["decoding, 1 sequence, source 32"] = lambda: decode(1, 32)
ROWS["decoding, 1 sequence, source 512"] = lambda: decode(1, 512)
ROWS["decoding, 4 beams, source 32"] = lambda: decode(1, 32, 4)
ROWS["switch-base-8, forward"] = lambda: model(training=False)
ROWS["switch-base-8, forward and backward"] = lambda: model(training=True)
NAMES = tuple(ROWS)


def main() -> None:
    import moezoo

    _torch().manual_seed(0)
    run = ROWS[sys.argv[1]]()
    print(moezoo.__file__, flush=True)
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), time.process_time()
        run()
        print(time.perf_counter() - clock, time.process_time() - processor, flush=True)


if __name__ == "__main__":
    main()
