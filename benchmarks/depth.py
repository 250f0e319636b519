"""Depth of the checks of routing: 10^7 random groups, each a case, against vectorised references.

    python -m benchmarks.depth [--cases 10000000] [--seed 0]

A case is one group of up to 8 tokens with up to 5 experts, up to 2 choices, padding and ties. Every
policy must respect capacity, revive nobody and serve min(C, demand) of every queue; positions and
`first_come` must equal running sums; `batch_priority` must not drop a surer token than it keeps.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn import functional as F

import moezoo
from moezoo.functional.assign import token_choice
from moezoo.functional.queues import queue_positions
from moezoo.records import Assignment, Routing, Tokens

BATCH = 50_000
POLICIES = ("first_come", "batch_priority", "random_order", "reroute")


def main() -> None:
    """Check the cases and print how many there were and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    start, done, checks = time.monotonic(), 0, 0
    while done < options.cases:
        groups = min(BATCH, options.cases - done)
        checks += check_batch(generator, groups)
        done += groups
    print(f"{done} cases, {checks} checks of a case, 0 failures, {time.monotonic() - start:.0f} s")


def check_batch(generator: torch.Generator, groups: int) -> int:
    """Return the number of checks made. Raises RuntimeError naming the first broken claim."""
    size, num_experts, limit = (
        int(torch.randint(low, high + 1, (), generator=generator))
        for low, high in ((1, 8), (1, 5), (1, 4))
    )
    k = min(num_experts, int(torch.randint(1, 3, (), generator=generator)))
    routing = random_routing(generator, groups, size, num_experts, k)
    offered = routing.assignment
    assert isinstance(offered, Assignment)
    position = by_running_sum(offered, groups, size)
    ours = queue_positions(offered)
    require(bool((ours == position)[offered.kept].all()), "positions equal running sums")
    demand, checks = loads(offered), 1
    for name in POLICIES:
        if name == "reroute" and k != 1:
            continue
        policy = moezoo.capacity.build({"name": name, "limit": limit}).train()
        admitted = policy(routing)
        load = loads(admitted)
        require(int(load.max()) <= limit, f"{name}: at most C per queue")
        fair = load >= demand.clamp(max=limit) if policy.moves else load == demand.clamp(max=limit)
        require(bool(fair.all()), f"{name}: min(C, demand) served")
        real = routing.real
        require(real is None or bool(real[admitted.token[admitted.kept]].all()), f"{name}: padding")
        if name == "first_come":
            same = torch.equal(admitted.kept, offered.kept & (position < limit))
            require(same, "first_come keeps a prefix")
            checks += 1
        if name == "batch_priority" and k == 1:
            check_priority(offered, admitted)
            checks += 1
        checks += 3
    return groups * checks


def random_routing(
    generator: torch.Generator, groups: int, size: int, num_experts: int, k: int
) -> Routing:
    """Groups of tokens with random probabilities; a third of the batches has ties, half padding."""
    scores = torch.randn(groups * size, num_experts, generator=generator)
    if int(torch.randint(3, (), generator=generator)) == 0:
        scores = scores.round()
    real = None
    if int(torch.randint(2, (), generator=generator)):
        real = torch.rand(groups * size, generator=generator) < 0.75
    probs = scores.softmax(-1)
    tokens = Tokens(scores, real=real, group_size=size)
    return Routing(token_choice(probs, probs, k, tokens), scores, probs, real=real)


def by_running_sum(a: Assignment, groups: int, size: int) -> Tensor:
    """Positions (N,) by the (tokens x experts) running sum of the paper's pseudo-code."""
    shape = (a.choices, groups, size)
    chosen = F.one_hot(a.expert, a.num_experts) * a.kept[:, None]
    chosen = chosen.view(*shape, -1).transpose(0, 1).reshape(groups, a.choices * size, -1)
    place = ((chosen.cumsum(1) - 1) * chosen).sum(-1)
    return place.view(groups, a.choices, size).transpose(0, 1).reshape(-1)


def loads(a: Assignment) -> Tensor:
    """Kept pairs of every queue (G * E,)."""
    key = (a.token // a.group_size) * a.num_experts + a.expert
    return torch.bincount(key[a.kept], minlength=a.num_groups * a.num_experts)


def check_priority(offered: Assignment, admitted: Assignment) -> None:
    """No dropped token of a queue is surer than a kept one."""
    in_order = admitted.token.argsort()
    kept = admitted.kept[in_order]
    key = (offered.token // offered.group_size) * offered.num_experts + offered.expert
    queues = offered.num_groups * offered.num_experts
    least = torch.full((queues,), 2.0).scatter_reduce_(0, key[kept], offered.weight[kept], "amin")
    lost = offered.kept & ~kept
    surest = torch.zeros(queues).scatter_reduce_(0, key[lost], offered.weight[lost], "amax")
    require(bool((surest <= least).all()), "batch_priority keeps the surest")


def require(holds: bool, claim: str) -> None:
    """Raise RuntimeError unless the claim holds."""
    if not holds:
        raise RuntimeError(f"a case breaks: {claim}")


if __name__ == "__main__":
    main()
