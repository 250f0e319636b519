"""How ranks find each other, in a store that other groups may have met in before.

torchrun keeps one store over all attempts of `--max-restarts`, in which the addresses and signs of
life of ranks that are gone still stand, and its nodes may count attempts differently. So every
meeting has a name of its own: rank 0 says it, each of the others answers with a word that nobody
has said before, and rank 0 repeats the words that it has heard.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from moezoo.errors import ConfigError, RankLost

_NAME, _ALL = "moezoo/meeting", "all"
_PAUSE, _LONGEST = 0.01, 0.2  # seconds between looks


def met(store: Store, rank: int, ranks: int, seconds: float) -> Store:
    """The part of a store that these ranks have for themselves, once all have come.

    Who came to an earlier meeting must be gone, or have left it. Raises RankLost where somebody
    does not come in time.
    """
    word, until, pause = uuid.uuid4().hex, time.monotonic() + seconds, _PAUSE
    if rank == 0:
        store.set(_NAME, word)
    while True:
        part, missing = _heard(store, word, ranks) if rank == 0 else _said(store, word, rank)
        if not missing:
            return part
        if time.monotonic() > until:
            hint = "See what it says itself, and start all ranks again."
            raise RankLost(f"{missing} did not come within {seconds:g} s", hint=hint)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)


def from_environment(limit: timedelta) -> tuple[Store, int, int]:
    """Store, rank and number of ranks as torchrun tells them. Raises ConfigError."""
    from torch.distributed.rendezvous import rendezvous

    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        hint = "Start with `torchrun --nproc-per-node N`, or pass store, rank and world_size."
        raise ConfigError(f"there is no {missing[0]} in the environment", field="rank", hint=hint)
    found: tuple[Store, int, int] = next(iter(rendezvous("env://", timeout=limit)))
    return found


def _heard(store: Store, name: str, ranks: int) -> tuple[Store, str]:
    """Rank 0's part, and who has not answered."""
    part = PrefixStore(f"moezoo/{name}", store)
    missing = [other for other in range(1, ranks) if not part.check([str(other)])]
    if not missing:
        part.set(_ALL, " ".join(part.get(str(other)).decode() for other in range(1, ranks)))
    return part, f"rank {', '.join(map(str, missing))}" if missing else ""


def _said(store: Store, word: str, rank: int) -> tuple[Store, str]:
    """Another rank's part as rank 0 names it now, and who is missing."""
    if not store.check([_NAME]):
        return store, "rank 0"
    part = PrefixStore(f"moezoo/{store.get(_NAME).decode()}", store)
    part.set(str(rank), word)
    heard = part.check([_ALL]) and word in part.get(_ALL).decode().split()
    return part, "" if heard else "rank 0, or somebody whom it waits for,"
