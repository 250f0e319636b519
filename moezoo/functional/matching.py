"""Exact balanced assignment: the greatest total score at equal load (a transportation problem).

Successive cheapest paths on the graph of experts. An assignment that gives every token the best of
`score - price` is optimal for the loads that it happens to have, whatever the prices; good prices
make those loads nearly equal, and every path moves one surplus token to where one is missing at the
least loss, which keeps the assignment optimal for its new loads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INFINITY = float("inf")


def balanced_assignment(score_NE: Tensor) -> Tensor:
    """The expert (N,) of every row, such that the total score is the greatest possible.

    Every expert gets floor(N / E) or ceil(N / E) rows, exactly N / E where E divides N. Runs in
    float64 on the CPU, takes time in proportion to N * E and to the surplus of the first guess, and
    has no gradient.
    """
    score_NE = torch.nan_to_num(score_NE.detach().to("cpu", torch.float64))
    num_rows, num_experts = score_NE.shape
    if num_rows == 0 or num_experts == 1:
        return torch.zeros(num_rows, dtype=torch.int64, device="cpu")
    return _Transport(score_NE).solve()


class _Transport:
    """The state of one solution: who is where, and what the cheapest move between experts costs.

    Nodes are the E experts and, last, the pool of the N mod E seats beyond floor(N / E). An expert
    may take one seat from the pool (an edge to it) or give it back (an edge from it), at no cost.
    """

    def __init__(self, score_NE: Tensor) -> None:
        self.score_NE = score_NE
        num_rows, self.num_experts = score_NE.shape
        floor, spare = divmod(num_rows, self.num_experts)
        price_E = _rough_prices(score_NE)
        self.expert_N = (score_NE - price_E).argmax(dim=1)
        # The dearest experts are the most wanted: giving them the spare seats is optimal as well.
        self.seated = torch.zeros(self.num_experts, dtype=torch.bool, device="cpu")
        self.seated[price_E.argsort(descending=True, stable=True)[:spare]] = True
        load_E = torch.bincount(self.expert_N, minlength=self.num_experts)
        self.surplus = torch.zeros(self.num_experts + 1, dtype=torch.int64, device="cpu")
        self.surplus[:-1] = load_E - floor - self.seated.long()
        nodes = self.num_experts + 1
        self.cost = torch.full((nodes, nodes), _INFINITY, dtype=torch.float64, device="cpu")
        self.mover = torch.zeros(nodes, nodes, dtype=torch.int64, device="cpu")
        self.tolerance = 1e-13 * max(float(score_NE.abs().max()), 1e-300)
        for expert in range(self.num_experts):
            self._refresh(expert)

    def solve(self) -> Tensor:
        for _ in range(int(self.surplus.clamp(min=0).sum())):
            self._move_along(self._cheapest_path())
        return self.expert_N

    def _refresh(self, expert: int) -> None:
        """Recompute the cheapest move from one expert to every other, and its pool edges."""
        member_M = (self.expert_N == expert).nonzero()[:, 0]
        self.cost[expert] = _INFINITY
        if member_M.numel():
            score_ME = self.score_NE[member_M]
            loss_E, place_E = (score_ME[:, expert, None] - score_ME).min(dim=0)
            self.cost[expert, :-1] = loss_E
            self.mover[expert, :-1] = member_M[place_E]
            self.cost[expert, expert] = _INFINITY
        seated = bool(self.seated[expert])
        self.cost[expert, -1] = _INFINITY if seated else 0.0
        self.cost[-1, expert] = 0.0 if seated else _INFINITY

    def _cheapest_path(self) -> list[int]:
        """Nodes from one with a surplus to one that lacks a row (Bellman-Ford, all at once)."""
        distance = torch.where(self.surplus > 0, 0.0, _INFINITY).to(torch.float64)
        parent = torch.full_like(self.surplus, -1)
        for _ in range(self.num_experts + 1):
            through, origin = (distance[:, None] + self.cost).min(dim=0)
            # Without the tolerance, rounding could make a cycle of no cost look profitable.
            better = through < distance - self.tolerance
            if not bool(better.any()):
                break
            distance = torch.where(better, through, distance)
            parent = torch.where(better, origin, parent)
        node = int(torch.where(self.surplus < 0, distance, _INFINITY).argmin())
        path = [node]
        while int(parent[node]) >= 0:
            node = int(parent[node])
            path.append(node)
        return path[::-1]

    def _move_along(self, path: list[int]) -> None:
        pool = self.num_experts
        for here, there in zip(path, path[1:], strict=False):
            if there == pool:
                self.seated[here] = True
            elif here == pool:
                self.seated[there] = False
            else:
                self.expert_N[self.mover[here, there]] = there
        self.surplus[path[0]] -= 1
        self.surplus[path[-1]] += 1
        for node in path:
            if node != pool:
                self._refresh(node)


def _rough_prices(score_NE: Tensor) -> Tensor:
    """Prices (E,) at which demand is nearly balanced: Sinkhorn steps at falling temperature."""
    num_rows, num_experts = score_NE.shape
    price_E = score_NE.new_zeros(num_experts)
    spread = float(score_NE.max() - score_NE.min())
    if spread == 0.0:
        return price_E
    aim = math.log(num_rows / num_experts)
    for divisor in (4.0, 16.0, 64.0, 256.0, 1024.0):
        temperature = spread / divisor
        for _ in range(8):
            share_NE = ((score_NE - price_E) / temperature).log_softmax(dim=1)
            price_E = price_E + temperature * (share_NE.logsumexp(dim=0) - aim)
    return price_E
