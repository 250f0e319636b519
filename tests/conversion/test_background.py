"""Reading ahead in another thread changes neither order nor errors, and stops when told to."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from moezoo.adapters.upcycle.background import ahead


def failing(count: int) -> Iterator[int]:
    yield from range(count)
    raise OSError("the disk")


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_items_come_in_order_and_the_error_after_them(count: int) -> None:
    assert list(ahead(iter(range(count)), 3)) == list(range(count))
    seen = []
    with pytest.raises(OSError, match="the disk"), closing(ahead(failing(count), 3)) as items:
        for item in items:
            seen.append(item)
    assert seen == list(range(count))


def test_no_more_is_made_than_was_allowed_to_wait_and_no_thread_stays() -> None:
    made = itertools.count()
    threads = threading.active_count()
    with closing(ahead(made, 4)) as items:
        assert [next(items), next(items)] == [0, 1]
    assert next(made) <= (1 + 4 + 1) * 4 and threading.active_count() == threads


def test_what_is_left_unread_is_closed_quietly(recwarn: pytest.WarningsRecorder) -> None:
    with closing(ahead(iter(range(100)), 2, 3)) as items:
        assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    gc.collect()
    assert not [str(warning.message) for warning in recwarn]
