"""Large memory in huge pages; that of gradients and scores is kept for the next step."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

# glibc hands out blocks beyond this straight from the system, never from its stock, whatever was
# freed before (M_MMAP_THRESHOLD_MAX): every page of them is a page fault.
_LARGE = 32 * 2**20
# Smaller ones come back to that stock, and from there to the system as soon as they lie at its end:
# by what lies behind them, the results of experts took 59 or 81 ms (8,192 tokens, 16 MiB).
_LARGE_RESULT = 8 * 2**20

# A kernel without huge pages refuses to be asked for them.
_HUGE_PAGES = hasattr(mmap, "MADV_FREE") and Path("/sys/kernel/mm/transparent_hugepage").is_dir()

_stock: dict[int, list[mmap.mmap]] = {}
# Scores come in as many sizes as batches do, so only the last ones are kept: those of one routing.
_recent: deque[mmap.mmap] = deque(maxlen=2)


def stacked_gradient(shape: Sequence[int], like: Tensor, written: Sequence[int]) -> Tensor:
    """A tensor (E, ...) of dtype and device of `like`: zero but for the entries `written`, which
    hold anything and are about to be overwritten.

    A large one on a Linux CPU lives in huge pages. Its memory comes back to a stock when the tensor
    is freed, and serves the gradient of the next training step; the system may take it away from
    the stock at any time (MADV_FREE), `release_memory` gives it back at once. Fresh memory for
    75 MB costs 20 ms with `torch.zeros`, 5 in huge pages, nothing from the stock
    (benchmarks/layer.md, "Fresh memory"). What is not written is given back to the system, which
    has zeros there when it is read: cheaper than writing them.
    """
    size = torch.Size(shape).numel() * like.element_size()
    if not in_huge_pages(size, like.device):
        return _zeroed(like.new_empty(shape), written)
    waiting = _stock.get(size)
    if not waiting:
        return _tensor(_huge_pages(size), like.dtype, _to_stock).view(shape)
    block = waiting.pop()
    gradient = _tensor(block, like.dtype, _to_stock)
    each, start = size // shape[0], 0
    for number in (*sorted(written), shape[0]):
        _clear(block, gradient.view(torch.uint8), start, number * each)
        start = (number + 1) * each
    return gradient.view(shape)


def large_empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """`torch.empty`, in huge pages when it is large and on a Linux CPU: filling fresh memory then
    costs a quarter. The last few that were freed serve the next of their size, as above.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if not in_huge_pages(size, torch.device(device or "cpu"), least=_LARGE_RESULT):
        return torch.empty(shape, dtype=dtype, device=device)
    block = _kept(size) or _huge_pages(size)
    return _tensor(block, dtype, _recent.append).view(torch.Size(shape))


def _kept(size: int) -> mmap.mmap | None:
    """A block of that size which was freed not long ago, if there is one."""
    with contextlib.suppress(IndexError):  # another thread took the last one
        for _ in range(len(_recent)):
            block = _recent.popleft()
            if len(block) == size:
                return block
            _recent.append(block)
    return None


def in_huge_pages(size: int, device: torch.device, *, least: int | None = None) -> bool:
    """Whether so many bytes get huge pages."""
    return size >= (least or _LARGE) and _HUGE_PAGES and device.type == "cpu"


def release_memory() -> None:
    """Give the memory that waits for further gradients and scores back to the system."""
    _stock.clear()
    _recent.clear()


def _zeroed(stacked: Tensor, written: Sequence[int]) -> Tensor:
    start = 0
    for number in (*sorted(written), stacked.shape[0]):
        if start < number:
            stacked[start:number].zero_()
        start = number + 1
    return stacked


def _clear(block: mmap.mmap, content: Tensor, start: int, end: int) -> None:
    """Zeros in bytes start to end of a block; its whole pages go back to the system."""
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last:
        if start < end:
            content[start:end].zero_()
        return
    block.madvise(mmap.MADV_DONTNEED, first, last - first)
    for begin, stop in ((start, first), (last, end)):
        if begin < stop:  # an expert's matrix is whole pages as a rule
            content[begin:stop].zero_()


def _huge_pages(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _tensor(block: mmap.mmap, dtype: torch.dtype, keep: Callable[[mmap.mmap], object]) -> Tensor:
    # The tensor keeps this view of the block alive; when the view goes, the block is free.
    view = (ctypes.c_char * len(block)).from_buffer(block)
    weakref.finalize(view, _put_back, block, keep).atexit = False
    return torch.frombuffer(view, dtype=dtype)


def _put_back(block: mmap.mmap, keep: Callable[[mmap.mmap], object]) -> None:
    block.madvise(mmap.MADV_FREE)
    keep(block)


def _to_stock(block: mmap.mmap) -> None:
    _stock.setdefault(len(block), []).append(block)
