"""A rank that is killed, stopped or leaves is a typed error of the others, never a hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from moezoo.errors import ConfigError, MoezooError, RankLost, TrainingError
from moezoo.parallel import guard, join
from moezoo.parallel.meeting import met
from tests.parallel.lone import wait, work
from tests.parallel.ranks import PRELOADED

pytestmark = pytest.mark.dist
PATIENCE = 120.0  # seconds after which a hang is a failure


def ranks_after(
    how: str,
    folder: Path,
    number: int | None = None,
    *,
    ranks: int = 2,
    victim: int = 1,
    run: Callable[[int, int, str, str], None] = work,
) -> list[int]:
    """Start ranks, send a signal to one once all have begun; the exit codes of the others, or of
    itself where it is rank 0.

    What they meet in is the caller's, as torchrun's store is the agent's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [
        context.Process(target=run, args=(rank, ranks, str(folder), how)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        if number is not None:
            _wait_for([folder / f"{rank}.begun" for rank in range(ranks)])
            time.sleep(0 if victim else 0.5)  # until it waits
            os.kill(processes[victim].pid or 0, number)
        others = [p for i, p in enumerate(processes) if number is None or i != victim]
        others = others if victim else processes[:1]
        for process in others:
            process.join(PATIENCE)
        return [-999 if process.exitcode is None else process.exitcode for process in others]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _wait_for(files: list[Path]) -> None:
    until = time.monotonic() + PATIENCE
    while not all(file.exists() for file in files):
        assert time.monotonic() < until, "the ranks did not begin"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> dist.TCPStore:
    found = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (tmp_path / "port").write_text(str(found.port))
    return found


def test_a_killed_rank_is_lost_for_both_others(tmp_path: Path) -> None:
    assert ranks_after("work", tmp_path, signal.SIGKILL, ranks=3) == [5, 5]
    for rank in (0, 2):
        said = (tmp_path / f"{rank}.log").read_text()
        assert said.startswith("RankLost step "), said
        assert "lost" in said
        assert "--resume" in said


def test_a_stopped_rank_is_lost_and_named(tmp_path: Path) -> None:
    assert ranks_after("work", tmp_path, signal.SIGSTOP) == [5]
    said = (tmp_path / "0.log").read_text()
    assert "rank 1 is lost: no sign of life for 1 s" in said


def test_an_error_of_one_rank_is_told_to_the_others(tmp_path: Path) -> None:
    assert ranks_after("error", tmp_path) == [5, 3]
    assert "rank 1 left with NonFiniteLoss: not finite at all" in (tmp_path / "0.log").read_text()
    assert (tmp_path / "1.log").read_text().startswith("NonFiniteLoss not finite at all")


def test_ranks_that_end_are_not_missed(tmp_path: Path) -> None:
    assert ranks_after("end", tmp_path) == [0, 0]
    assert not (tmp_path / "0.log").read_text()


def test_a_group_begins_anew_in_the_store_of_one_that_lost_a_rank(tmp_path: Path) -> None:
    """As torchrun's next attempt does: the signs, addresses and losses of the last one stand."""
    assert ranks_after("work", tmp_path, signal.SIGSTOP) == [5]
    assert ranks_after("end", tmp_path) == [0, 0]
    assert "is lost" not in (tmp_path / "1.log").read_text()


def test_a_process_joins_again_and_a_lost_rank_is_missed_as_before(tmp_path: Path) -> None:
    assert ranks_after("again", tmp_path, signal.SIGSTOP) == [5]
    assert "rank 1 is lost: no sign of life for 1 s" in (tmp_path / "0.log").read_text()


def test_who_does_not_come_is_named(store: dist.TCPStore) -> None:
    with pytest.raises(RankLost, match=r"^rank 1, 2 did not come within 0.1 s\. See"):
        met(store, 0, 3, 0.1)
    with pytest.raises(RankLost, match=r"^rank 0, or somebody whom it waits for, did not come"):
        met(store, 1, 3, 0.1)  # the name is of a meeting that was over before


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
@pytest.mark.parametrize(("how", "ranks"), [("deaf", 2), ("alone", 1)])
def test_a_signal_ends_a_rank_that_waits_for_another(
    how: str, ranks: int, number: int, code: int, word: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    assert ranks_after(how, tmp_path, number, ranks=ranks, victim=0, run=wait) == [code]
    assert time.monotonic() - began < 10
    said = (tmp_path / "0.log").read_text()
    assert said == f"moezoo: rank 0: {word} in a wait; what was saved is whole\n"


def test_a_guard_alone_changes_no_error() -> None:
    with pytest.raises(ValueError, match="own"), guard(1):
        raise ValueError("own")
    with pytest.raises(RuntimeError, match="connection closed by peer"), guard(1):
        raise RuntimeError("connection closed by peer")  # of whatever: there is no group


def test_who_is_lost_ends_with_5_and_is_a_training_error() -> None:
    assert RankLost.exit_code == 5
    assert issubclass(RankLost, TrainingError)
    assert issubclass(RankLost, MoezooError)


def test_joining_without_torchrun_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no RANK in the environment.*torchrun"):
        join()
    with pytest.raises(ConfigError, match="timeout"):
        join(timeout=0.0)
    with pytest.raises(ConfigError, match="heartbeat"):
        join(heartbeat=-1.0)
