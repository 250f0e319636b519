"""A rank that is lost is an error within seconds, not a run that hangs.

Whoever waits for a killed process learns it from the broken connection at once. Nothing tells of a
stopped one, and neither gloo nor NCCL can be woken from a wait: so every rank gives signs of life
through the store that the group met in, looks for those of the next one, and ends its process
where it would wait for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from moezoo.errors import ConfigError, RankLost
from moezoo.parallel.meeting import from_environment, met

_HINT = "Go on from the last checkpoint with --resume."
_TICKS = 8  # signs of life per heartbeat; so many without one, and a rank is lost
_GRACE = 1.0  # seconds for a broken connection to say it first, and for a reason to arrive
_BROKEN = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
    "read error",
    "gloo/transport",
    "nccl communicator was aborted",
    "remote process exited",
)


def join(
    *,
    timeout: float = 600.0,
    heartbeat: float = 5.0,
    store: Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> None:
    """Enter the process group that torchrun's environment describes, and watch over it.

    gloo for tensors on a CPU, NCCL for those on a GPU; `cuda` means the GPU of the local rank.

    Args:
        timeout: seconds after which a collective that somebody does not come to fails.
        heartbeat: seconds without a sign of life after which a rank counts as lost (see `guard`);
            0: nobody watches.
        store, rank, world_size: where to meet and as whom, without torchrun.

    One store may serve one group after another (`--max-restarts`; `join` after `leave`).

    Raises ConfigError where this is not known, or the process is in a group already; RankLost
    where a rank does not come within the timeout.
    """
    for name, value in (("timeout", timeout), ("heartbeat", heartbeat)):
        if not 0 <= value < float("inf") or (name == "timeout" and not value):
            raise ConfigError(f"{name} is a number of seconds", field=name, found=value)
    if dist.is_initialized():
        raise ConfigError("this process has joined a group already", hint="Call join() once.")
    limit = timedelta(seconds=timeout)
    if store is None:
        store, rank, world_size = from_environment(limit)
    if rank is None or world_size is None:
        raise ConfigError("a store needs rank and world_size", field="rank")
    local = int(os.environ.get("LOCAL_RANK", rank))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    part = met(store, rank, world_size, timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore("group", part),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    if heartbeat > 0 and world_size > 1:
        own: Any = part  # a connection of its own: a thread that waits holds one
        _watch(_Watcher(own.clone(), rank, world_size, heartbeat))
        atexit.register(_watch, None)


def leave() -> None:
    """Leave the group: the others no longer wait for signs of life from here."""
    _watch(None)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def guard(step: int | None = None) -> Iterator[None]:
    """Within the block a lost rank is RankLost, which names it where that is known.

    A killed rank raises it as soon as something is waited for. Where a stopped one would be waited
    for without end, the process says the same on standard error and ends with RankLost's exit
    code. An error of this rank's own is told to the others. Without a group nothing happens.

    Args:
        step: of training, to be named.
    """
    watcher = _watcher
    where = "" if step is None else f"step {step}: "
    if watcher is not None:
        watcher.enter(where)
    try:
        yield
    except Exception as error:
        if dist.is_initialized() and _is_broken(error):
            reason = None if watcher is None else watcher.reason(_GRACE)
            raise _lost(where, reason or f"a rank is lost ({_phrase(error)})") from error
        if watcher is not None and not isinstance(error, RankLost):
            watcher.announce(error)
        raise
    finally:
        if watcher is not None:
            watcher.exit()


class _Watcher:
    """Gives signs of life and looks for those of the next rank, in two threads: one speaks with the
    store, the other judges, so that a store that answers no longer counts as lost too.

    Time is counted in own ticks: a job that was stopped as a whole and goes on misses nobody.
    """

    def __init__(self, store: Store, rank: int, ranks: int, heartbeat: float) -> None:
        self.store, self.rank, self.ranks = store, rank, ranks
        self.heartbeat, self.pause = heartbeat, heartbeat / _TICKS
        self.lost = threading.Event()  # `_reason` says who
        self._reason = ""
        self._own = ""  # an error of this rank that is to be told
        self._told = threading.Event()
        self._wake = threading.Event()
        self._end = threading.Event()
        self._ticks = 0
        self._guarded: list[str] = []
        self._threads = [
            threading.Thread(target=run, daemon=True) for run in (self._speak, self._judge)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say goodbye, so that nobody misses this rank."""
        self._end.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=_GRACE)

    def enter(self, where: str) -> None:
        if self.lost.is_set():
            raise _lost(where, self._reason)
        self._guarded.append(where)

    def exit(self) -> None:
        if self._guarded:
            self._guarded.pop()

    def reason(self, seconds: float) -> str | None:
        """Who is lost, if it becomes known within some seconds."""
        return self._reason if self.lost.wait(seconds) else None

    def announce(self, error: Exception) -> None:
        """Tell the others that this rank leaves with an error."""
        self._own = f"rank {self.rank} left with {type(error).__name__}: {_first_line(error)}"
        self._wake.set()
        self._told.wait(_GRACE)

    def _speak(self) -> None:
        watched, seen, missed = (self.rank + 1) % self.ranks, b"", 0
        while not self._end.is_set() and not self.lost.is_set():
            try:
                self._sign()
                watched, seen, missed = self._look(watched, seen, missed)
            except (RuntimeError, OSError) as error:  # what a store says that is gone
                self._find(f"the meeting point is lost ({_first_line(error)})")
            self._ticks += 1
            self._wake.wait(self.pause)
            self._wake.clear()
        with contextlib.suppress(RuntimeError, OSError):
            self._sign()

    def _sign(self) -> None:
        if self._own:
            self.store.set("lost", self._own)
            self._told.set()
        self.store.set(f"alive/{self.rank}", "bye" if self._end.is_set() else str(self._ticks))

    def _look(self, watched: int, seen: bytes, missed: int) -> tuple[int, bytes, int]:
        """The rank to look at next, its last sign, and for how many ticks it is the last."""
        if self.store.check(["lost"]):
            self._find(self.store.get("lost").decode())
        key = f"alive/{watched}"
        if watched == self.rank or not self.store.check([key]):  # alone, or it has not begun
            return watched, seen, 0
        sign = self.store.get(key)
        if sign == b"bye":
            return (watched + 1) % self.ranks, b"", 0
        missed = missed + 1 if sign == seen else 0
        if missed > _TICKS:
            found = f"rank {watched} is lost: no sign of life for {self.heartbeat:g} s"
            self.store.set("lost", found)
            self._find(found)
        return watched, sign, missed

    def _judge(self) -> None:
        """End the process where it waits for a rank that is lost."""
        ticks, missed = -1, 0
        while not self._end.is_set() and not self.lost.wait(self.pause):
            missed = missed + 1 if ticks == self._ticks else 0
            ticks = self._ticks
            if missed > _TICKS:
                self._find(f"the meeting point is lost: no answer for {self.heartbeat:g} s")
        # Who enters a guard from now on gets the error there; who is in one has a moment to leave.
        while not self._end.wait(_GRACE):
            if self._guarded and not self._own:
                sys.stderr.write(f"moezoo: {_lost(self._guarded[-1], self._reason)}\n")
                sys.stderr.flush()
                os._exit(RankLost.exit_code)

    def _find(self, reason: str) -> None:
        if not self.lost.is_set():
            self._reason = reason
            self.lost.set()


_watcher: _Watcher | None = None  # of this process, as its group is torch's own


def _watch(watcher: _Watcher | None) -> None:
    global _watcher
    before, _watcher = _watcher, watcher
    if before is not None:
        before.stop()
    if watcher is not None:
        watcher.start()


def _is_broken(error: Exception) -> bool:
    """Whether an error is what a collective says when somebody is gone."""
    if isinstance(error, RankLost) or not isinstance(error, RuntimeError):
        return False
    known = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return known or _phrase(error) in _BROKEN


def _phrase(error: Exception) -> str:
    """What a backend says in plain words, else the beginning of it all."""
    text = str(error).lower()
    return next((phrase for phrase in _BROKEN if phrase in text), _first_line(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _lost(where: str, reason: str) -> RankLost:
    return RankLost(f"{where}{reason}", hint=_HINT)
