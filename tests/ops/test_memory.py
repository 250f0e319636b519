"""Memory of large gradients: zero where it must be, used again, given back."""

from __future__ import annotations

import mmap

import pytest
import torch

from moezoo.ops import memory
from moezoo.ops.memory import large_empty, release_memory, stacked_gradient

SHAPE = (4, 1024, 2048)  # 32 MiB in float32
LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def empty_stock() -> None:
    release_memory()


@pytest.mark.parametrize("shape", [SHAPE, (33, 1025, 257), (20_000, 500), (4, 3), (0, 3)])
def test_what_is_not_written_is_zero(shape: tuple[int, ...]) -> None:
    for written in ([1, 3], [0, 1, 2, 3], [2], []):
        written = written[: shape[0]]
        for _ in range(2):
            gradient = stacked_gradient(shape, LIKE, written)
            assert gradient.shape == shape
            rest = [number for number in range(shape[0]) if number not in written]
            assert not gradient[rest].any()
            gradient.fill_(float("nan"))


def test_a_system_without_huge_pages_gets_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_HUGE_PAGES", False)
    gradient = stacked_gradient(SHAPE, LIKE, [1])
    assert not gradient[[0, 2, 3]].any()
    del gradient
    assert not memory._stock


def test_freed_memory_serves_the_next_gradient_until_it_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not memory._HUGE_PAGES:  # the stock itself works with pages of any size
        monkeypatch.setattr(memory, "_huge_pages", lambda size: mmap.mmap(-1, size))
        monkeypatch.setattr(memory, "_HUGE_PAGES", True)
    first = stacked_gradient(SHAPE, LIKE, range(4))
    place, part = first.data_ptr(), first[1]
    del first
    other = stacked_gradient(SHAPE, LIKE, range(4))
    assert other.data_ptr() != place  # a view of the first one is still alive
    del part
    assert stacked_gradient(SHAPE, LIKE, range(4)).data_ptr() == place
    assert memory._stock
    release_memory()
    assert not memory._stock


def test_it_has_the_dtype_of_its_example() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert stacked_gradient(SHAPE, LIKE.to(dtype), [0]).dtype == dtype


@pytest.mark.parametrize("shape", [SHAPE, (4, 3), (0, 3)])
def test_large_memory_is_written_and_read_like_any(shape: tuple[int, ...]) -> None:
    tensor = large_empty(shape, torch.float32)
    expected = torch.arange(tensor.numel(), dtype=torch.float32).view(shape)
    tensor.copy_(expected)
    assert torch.equal(tensor, expected)
    assert tensor.requires_grad_().is_leaf


def test_freed_large_memory_serves_the_next_of_its_size_but_never_two() -> None:
    release_memory()
    first = large_empty(SHAPE, torch.float32)
    place = first.data_ptr()
    other = large_empty(SHAPE, torch.float32)
    assert other.data_ptr() != place
    del first
    again = large_empty(SHAPE, torch.float32)
    assert again.data_ptr() == place and not memory._recent
    again.fill_(1.0)
    other.fill_(2.0)
    assert bool((again == 1.0).all())


def test_of_large_memory_only_the_last_ones_are_kept() -> None:
    release_memory()
    for more in range(5):
        large_empty((SHAPE[0] + more, *SHAPE[1:]), torch.float32)
    assert len(memory._recent) == 2 and not memory._stock
