"""Pairs of tokens and experts as rows by expert, cut into strips that a cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.ops.products import Sharing

_STRIP = 2**18  # numbers of hidden units of a strip with several experts: 1 MiB in float32
_LONGER = 16  # times for products that are one call for many experts
_MANY = 96  # rows of an expert that are a strip of their own
_FEW = 128  # pairs that are sorted sooner by the host
# Experts with rows of one of these classes may share a product, filled up to the most of them.
_SHARED = ((1, 4), (5, 8), (9, 16))


class Batch(NamedTuple):
    """`size` experts from `first` on, `step` apart, whose `rows` are as many each, one expert's
    after the other's.
    """

    first: int
    size: int
    step: int
    rows: slice

    @property
    def experts(self) -> slice:
        return slice(self.first, self.first + (self.size - 1) * self.step + 1, self.step)

    def after(self, start: int) -> slice:
        """Its rows among those from `start` on."""
        return slice(self.rows.start - start, self.rows.stop - start)


Strip = tuple[list[Batch], slice]
_Group = tuple[list[int], int]  # experts a step apart, and how many rows each of them is given


@dataclass(frozen=True)
class Plan:
    """Which pair stands in which row, and which rows go together.

    Fields: pair (N,), that of each row, k-th choice of token t being t * K + k; token (N,); row
    (T, K), the row of each pair; used: rows past it have no expert; strips: batches of experts, and
    the rows of all of them; hit: the experts that have rows; spare: rows before `used` that only
    fill up a batch, with a pair of the same expert, or None.
    """

    pair: Tensor
    token: Tensor
    row: Tensor
    used: int
    strips: list[Strip]
    hit: list[int]
    spare: Tensor | None


def planned(expert: Tensor, shape: torch.Size, sharing: Sharing) -> Plan:
    """Rows by expert of choices (T, K), for stacks of `shape` (E, H, D); synchronises. A product
    that experts share has as many of them for each thread.
    """
    tokens, choices = expert.shape
    order_N, counts = _sorted(expert.reshape(-1), shape[0])
    hit = [index for index, count in enumerate(counts) if count]
    most = max(_STRIP * (_LONGER if sharing.onednn else 1) // shape[1], 1)
    groups = _grouped(hit, counts, most, sharing)
    batches = _batches(groups)
    end = batches[-1].rows.stop if batches else 0
    if len(groups) < len(hit):
        pair_N, row_N, spare_S = _laid_out(order_N, hit, counts, groups)
    else:
        pair_N, spare_S = order_N, None
        row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.shape[0]))
    token_N = pair_N if choices == 1 else pair_N // choices
    strips = _strips(batches, most)
    return Plan(pair_N, token_N, row_N.view(tokens, choices), end, strips, hit, spare_S)


def lone_batches(
    experts: list[int], shape: torch.Size, sharing: Sharing
) -> tuple[list[Batch], list[int]]:
    """One token's choices, all different, in batches of one row an expert, and which choice stands
    in which row; see `planned`.
    """
    hit = [index for index in experts if index < shape[0]]
    groups = _grouped(sorted(hit), [1] * shape[0], max(_STRIP // shape[1], 1), sharing)
    return _batches(groups), [experts.index(index) for group, _ in groups for index in group]


def _sorted(flat_N: Tensor, number: int) -> tuple[Tensor, list[int]]:
    """Pairs by expert, those without one last, and each expert's count."""
    if flat_N.shape[0] > _FEW:
        flat_N = flat_N.clamp(max=number)
        counts = flat_N.bincount(minlength=number).tolist()[:number]
        return flat_N.sort(stable=True).indices, counts
    ids, counts = flat_N.tolist(), [0] * number
    for index in ids:
        if index < number:
            counts[index] += 1
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return torch.tensor(order, dtype=torch.int64), counts


def _grouped(hit: list[int], counts: list[int], most: int, sharing: Sharing) -> list[_Group]:
    """Those that share a product, filled up to the same number of rows, then each that has its own:
    threads take whole experts, so a group has as many for each of them.
    """
    threads = torch.get_num_threads()
    groups: list[_Group] = []
    left = hit
    for low, high in _SHARED:
        if high > sharing.rows:
            break
        members = [index for index in left if low <= counts[index] <= high]
        start = 0
        while len(members) - start >= max(threads, sharing.size):
            length = min(_steady(members, start, sharing), max(most // high, 1))
            each = length // threads
            if sharing.onednn and each:  # few shapes
                each = 1 << each.bit_length() - 1
            length = each * threads
            if length < sharing.size:
                start += 1
                continue
            group = members[start : start + length]
            start += length
            groups.append((group, high if sharing.onednn else max(counts[e] for e in group)))
    if groups:
        grouped = {index for group, _ in groups for index in group}
        left = [index for index in hit if index not in grouped]
    return [*groups, *(([index], counts[index]) for index in left)]


def _steady(members: list[int], start: int, sharing: Sharing) -> int:
    """How many from `start` on are equally far apart, so that their matrices have one stride."""
    step = members[start + 1] - members[start]
    if sharing.onednn and step != 1:
        return 1
    end = start + 2
    while end < len(members) and members[end] - members[end - 1] == step:
        end += 1
    return end - start


def _batches(groups: list[_Group]) -> list[Batch]:
    batches, end = [], 0
    for group, given in groups:
        start, end = end, end + len(group) * given
        step = group[1] - group[0] if len(group) > 1 else 1
        batches.append(Batch(group[0], len(group), step, slice(start, end)))
    return batches


def _laid_out(
    order_N: Tensor, hit: list[int], counts: list[int], groups: list[_Group]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sorted pairs in the order of groups, filled up with the first of their expert's; the row of
    each pair; and the rows that only fill up.
    """
    order, ends = order_N.tolist(), accumulate(counts[index] for index in hit)
    end_of = dict(zip(hit, ends, strict=True))
    pairs: list[int] = []
    spare: list[int] = []
    row = [0] * len(order)
    for group, given in groups:
        for index in group:
            count, end, place = counts[index], end_of[index], len(pairs)
            own = order[end - count : end]
            for number, pair in enumerate(own, place):
                row[pair] = number
            pairs += own
            if count < given:
                spare += range(place + count, place + given)
                pairs += own[:1] * (given - count)
    without = order[sum(counts) :]
    for number, pair in enumerate(without, len(pairs)):
        row[pair] = number
    spare_S = torch.tensor(spare) if spare else None
    return torch.tensor(pairs + without), torch.tensor(row), spare_S


def _strips(batches: list[Batch], most: int) -> list[Strip]:
    strips: list[Strip] = []
    for batch in batches:
        rows = batch.rows
        many = batch.size == 1 and rows.stop - rows.start >= _MANY
        if strips and not many and rows.stop - strips[-1][1].start <= most:
            before, whole = strips[-1]
            strips[-1] = ([*before, batch], slice(whole.start, rows.stop))
        else:
            strips.append(([batch], rows))
    return strips
