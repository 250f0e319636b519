"""Threads that take jobs in turn: a fraction of concurrent.futures, in its time to import too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Job = tuple[Callable[..., None], tuple[Any, ...]]


class Workers:
    """Up to `count` threads, started as jobs come; jobs begin in the order in which they came.

    A job's error stops no other job. It waits for `check` or `finish`.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._stopped = False

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Let a thread call `job(*arguments)`."""
        self._jobs.put((job, arguments))
        if len(self._threads) < self._count:
            # A daemon: who interrupts the program twice does not wait for it.
            thread = threading.Thread(target=self._work, daemon=True)
            thread.start()
            self._threads.append(thread)

    def check(self) -> None:
        """Raise the first error of a job, if there was one."""
        if self._errors:
            raise self._errors[0]

    def finish(self) -> None:
        """Wait until every job is done. Raises the first error of a job."""
        self._join()
        self.check()

    def stop(self) -> None:
        """Drop the jobs that have not begun and wait for the others; errors are dropped too."""
        self._stopped = True
        self._join()

    def _join(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            if not self._stopped:
                job, arguments = entry
                with _Kept(self._errors):
                    job(*arguments)
                del job, arguments  # an idle thread holds no memory of its last job
            del entry


class _Kept:
    """Keeps an error of the block for `check`, which raises it in the thread that asks."""

    def __init__(self, errors: list[BaseException]) -> None:
        self._errors = errors

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self._errors.append(error)
        return True
