"""Reading ahead in another thread changes neither order nor errors, and stops when told to."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from moezoo.adapters.upcycle.background import Flusher, ahead
from moezoo.adapters.workers import Workers


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


def test_a_batch_is_handed_on_when_its_items_are_large_enough_together() -> None:
    made = itertools.count()
    with closing(ahead(made, 1, 10, lambda item: 10 if item % 2 else 1)) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
    assert next(made) <= 2 * (1 + 1 + 1)


def test_jobs_begin_in_order_and_the_first_error_waits_for_who_asks() -> None:
    workers, done = Workers(1), list[int]()

    def job(number: int) -> None:
        done.append(number)
        if number in (3, 5):
            raise OSError(number, "the disk")

    for number in range(8):
        workers.submit(job, number)
    with pytest.raises(OSError, match="3"):
        workers.finish()
    assert done == list(range(8))
    with pytest.raises(OSError, match="3"):
        workers.check()


def test_stopping_drops_what_has_not_begun_and_leaves_no_thread() -> None:
    threads, begun, go_on = threading.active_count(), threading.Event(), threading.Event()
    workers, done = Workers(2), list[int]()

    def slow() -> None:
        begun.set()
        go_on.wait()
        done.append(0)

    workers.submit(slow)
    begun.wait()
    workers.submit(slow)
    for number in range(1, 100):
        workers.submit(done.append, number)
    threading.Timer(0.1, go_on.set).start()
    workers.stop()
    assert 1 <= done.count(0) <= 2 and len(done) <= 2
    assert threading.active_count() <= threads + 1  # the timer may be ending


class Full:
    """A file whose disk reports an error when it is asked to keep what was written."""

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_an_error_of_the_last_flush_is_raised() -> None:
    with pytest.raises(OSError, match="Input/output"), Flusher() as flusher:
        flusher.wrote(Full(), 64 << 20)  # type: ignore[arg-type]
    with pytest.raises(KeyError), Flusher() as flusher:  # an error of the block comes first
        flusher.wrote(Full(), 64 << 20)  # type: ignore[arg-type]
        raise KeyError
