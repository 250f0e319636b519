"""Pairs of tokens and experts as rows by expert, cut into strips that a cache holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.ops.backends import Runs

_STRIP = 2**18  # numbers of hidden units of a strip with several experts: 1 MiB in float32
_MANY = 96  # rows of an expert that are a strip of their own
_FEW = 64  # pairs that are sorted sooner by the host


@dataclass(frozen=True)
class Plan:
    """Which pair stands in which row, and which rows go together.

    Fields: pair (N,), that of each row, k-th choice of token t being t * K + k; token (N,); row
    (T, K), the row of each pair; used: rows past it have no expert; strips: experts with their
    rows, and the rows of all of them.
    """

    pair: Tensor
    token: Tensor
    row: Tensor
    used: int
    strips: list[tuple[Runs, slice]]


def planned(expert: Tensor, shape: torch.Size) -> Plan:
    """Rows by expert of choices (T, K), for stacks of `shape` (E, H, D); synchronises."""
    tokens, choices = expert.shape
    number = shape[0]
    flat_N = expert.reshape(-1)
    if flat_N.shape[0] <= _FEW:
        return _planned_by_host(flat_N.tolist(), tokens, choices, shape)
    flat_N = flat_N.clamp(max=number)
    pair_N = flat_N.sort(stable=True).indices
    place_N = torch.arange(pair_N.shape[0])
    row_N = torch.empty_like(pair_N).scatter_(0, pair_N, place_N)
    counts = flat_N.bincount(minlength=number).tolist()[:number]
    runs, used = [], 0
    for index, count in enumerate(counts):
        if count:
            runs.append((index, slice(used, used + count)))
            used += count
    return Plan(pair_N, pair_N // choices, row_N.view(tokens, choices), used, _strips(runs, shape))


def _planned_by_host(ids: list[int], tokens: int, choices: int, shape: torch.Size) -> Plan:
    number = shape[0]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    row = [0] * len(ids)
    runs: Runs = []
    used = 0
    for place, pair in enumerate(order):
        row[pair] = place
        index = ids[pair]
        if index >= number:
            continue
        used = place + 1
        if runs and runs[-1][0] == index:
            runs[-1] = (index, slice(runs[-1][1].start, used))
        else:
            runs.append((index, slice(place, used)))
    pair_N = torch.tensor(order)
    row_TK = torch.tensor(row).view(tokens, choices)
    return Plan(pair_N, pair_N // choices, row_TK, used, _strips(runs, shape))


def _strips(runs: Runs, shape: torch.Size) -> list[tuple[Runs, slice]]:
    most = max(_STRIP // shape[1], 1)
    strips: list[tuple[Runs, slice]] = []
    for run in runs:
        expert, rows = run
        many = rows.stop - rows.start >= _MANY
        if strips and not many and rows.stop - strips[-1][1].start <= most:
            runs_before, before = strips[-1]
            strips[-1] = ([*runs_before, run], slice(before.start, rows.stop))
        else:
            strips.append(([run], rows))
    return strips
