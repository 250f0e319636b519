"""Pairs of tokens and experts as rows by expert, cut into strips that a cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.errors import RoutingError

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


@dataclass(frozen=True)
class Strip:
    """Batches, and the rows of all of them, which follow each other."""

    batches: list[Batch]
    rows: slice

    @property
    def is_single(self) -> bool:
        """Whether there is one expert."""
        return len(self.batches) == 1 and self.batches[0].size == 1

    @property
    def experts(self) -> slice:
        """From the first one to the last, those without rows too."""
        return slice(self.batches[0].first, self.batches[-1].first + 1)

    @cached_property
    def ends(self) -> Tensor | None:
        """Where the rows of each of `experts` end, (experts,) int32, if none of them share."""
        if any(batch.size > 1 for batch in self.batches):
            return None
        first = self.batches[0].first
        ends = [0] * (self.batches[-1].first + 1 - first)
        for batch in self.batches:
            ends[batch.first - first] = batch.rows.stop - batch.rows.start
        return torch.tensor(list(accumulate(ends)), dtype=torch.int32)


Numbers = list[int] | Tensor  # int64
_Group = tuple[list[int], int]  # experts a step apart, and how many rows each of them is given


@dataclass(frozen=True)
class Plan:
    """Which pair stands in which row, and which rows go together.

    Fields: pairs (N), that of each row, k-th choice of token t being t * K + k; places (T * K), the
    row of each pair; shape: (T, K); used: rows past it have no expert; strips: of those before;
    hit: the experts that have rows; spares: rows before `used` that only fill up a batch, with a
    pair of the same expert.
    """

    pairs: Numbers
    places: Numbers
    shape: torch.Size
    used: int
    strips: list[Strip]
    hit: list[int]
    spares: list[int]

    @property
    def rows(self) -> int:
        """N."""
        return len(self.pairs)

    @cached_property
    def pair(self) -> Tensor:
        """(N,)."""
        return torch.as_tensor(self.pairs, dtype=torch.int64)

    @cached_property
    def token(self) -> Tensor:
        """(N,), the token of each row."""
        choices = self.shape[1]
        return self.pair if choices == 1 else self.pair // choices

    @cached_property
    def row(self) -> Tensor:
        """(T, K), the row of each pair."""
        return torch.as_tensor(self.places, dtype=torch.int64).view(self.shape)

    def taken(self, x: Tensor, rows: slice) -> Tensor:
        """The tokens x (T, M) of some rows (n, M), contiguous."""
        if self.shape[0] == 1:
            return x.expand(rows.stop - rows.start, -1).contiguous()
        return x.index_select(0, self.token[rows])


def planned(expert: Tensor, shape: torch.Size, shared: int, *, longer: bool = False) -> Plan:
    """Rows by expert of choices (T, K), for stacks of `shape` (E, H, D); synchronises.

    Args:
        shared: up to how many rows experts share a product, as many of them for each thread.
        longer: strips are of products that are one call for many experts.
    """
    order, counts = _sorted(expert.reshape(-1), shape[0])
    most = max(_STRIP * (_LONGER if longer else 1) // shape[1], 1)
    groups = _grouped(counts, most, shared)
    batches = _batches(groups)
    end = batches[-1].rows.stop if batches else 0
    rest = expert.shape, end, _strips(batches, most), list(counts)
    if isinstance(order, list) or len(groups) < len(counts):
        pairs, places, spares = _laid_out(order, counts, groups)
        return Plan(pairs, places, *rest, spares)
    place_N = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    return Plan(order, place_N, *rest, [])


def _sorted(flat_N: Tensor, number: int) -> tuple[Numbers, dict[int, int]]:
    """Pairs by expert, those without one last, and how many each expert has that has any."""
    if flat_N.shape[0] > _FEW:
        _refuse_negative(int(flat_N.min()))
        flat_N = flat_N.clamp(max=number)
        found = enumerate(flat_N.bincount(minlength=number).tolist()[:number])
        return flat_N.sort(stable=True).indices, {index: count for index, count in found if count}
    ids: list[int] = flat_N.tolist()
    _refuse_negative(min(ids, default=0))
    counts: dict[int, int] = {}
    for index in sorted(ids):
        if index < number:
            counts[index] = counts.get(index, 0) + 1
    return sorted(range(len(ids)), key=ids.__getitem__), counts


def _refuse_negative(lowest: int) -> None:
    if lowest < 0:
        hint = "What no expert here takes has the number of experts as its own."
        raise RoutingError("experts are numbered from 0", field="expert", found=lowest, hint=hint)


def _grouped(counts: dict[int, int], most: int, shared: int) -> list[_Group]:
    """Those that share a product, filled up to the same number of rows, then each that has its own:
    threads take whole experts, so a group has as many for each of them.
    """
    threads = torch.get_num_threads()
    groups: list[_Group] = []
    left = list(counts)
    for low, high in _SHARED:
        if high > shared:
            break
        members = [index for index in left if low <= counts[index] <= high]
        start = 0
        while len(members) - start >= max(threads, 2):
            length = min(_steady(members, start), max(most // high, 1))
            length -= length % threads
            if length < 2:
                start += 1
                continue
            group = members[start : start + length]
            start += length
            groups.append((group, max(counts[index] for index in group)))
    if groups:
        grouped = {index for group, _ in groups for index in group}
        left = [index for index in left if index not in grouped]
    return [*groups, *(([index], counts[index]) for index in left)]


def _steady(members: list[int], start: int) -> int:
    """How many from `start` on are equally far apart, so that their matrices have one stride."""
    step = members[start + 1] - members[start]
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
    sorted_pairs: Numbers, counts: dict[int, int], groups: list[_Group]
) -> tuple[list[int], list[int], list[int]]:
    """Sorted pairs in the order of groups, filled up with the first of their expert's; the row of
    each pair; and the rows that only fill up.
    """
    order = sorted_pairs.tolist() if isinstance(sorted_pairs, Tensor) else sorted_pairs
    end_of = dict(zip(counts, accumulate(counts.values()), strict=True))
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
    without = order[sum(counts.values()) :]
    for number, pair in enumerate(without, len(pairs)):
        row[pair] = number
    return pairs + without, row, spare


def _strips(batches: list[Batch], most: int) -> list[Strip]:
    strips: list[list[Batch]] = []
    for batch in batches:
        start, stop = batch.rows.start, batch.rows.stop
        many = batch.size == 1 and stop - start >= _MANY
        if strips and not many and stop - strips[-1][0].rows.start <= most:
            strips[-1].append(batch)
        else:
            strips.append([batch])
    return [Strip(held, slice(held[0].rows.start, held[-1].rows.stop)) for held in strips]
