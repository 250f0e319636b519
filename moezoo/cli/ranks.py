"""A verb under torchrun: every rank runs it, rank 0 speaks."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from moezoo.cli.signals import ending_where_deaf

OVER_RANKS = ("train", "finetune", "evaluate")
_FLAGS = ("ep", "hybrid", "precision", "timeout", "heartbeat")
# Flags of one process. torch's compiler gives up on blocks that FSDP2 brings the weights of, with
# lengths of any size ("Exponent must be non-negative", torch 2.13).
_ALONE = ("watch", "compile")
# Seconds in which a wait for others may end after SIGTERM: no work is lost while they meet, and a
# save takes some; torchrun kills after 30.
_MEETING, _WORKING = 3.0, 20.0


def world() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun tells them; (0, 1) without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isdecimal() for value in values):
        return 0, 1
    return int(values[0]), int(values[1])


def refusal(verb: str) -> str | None:
    """Why a verb does not run under torchrun, if so."""
    _, ranks = world()
    if ranks == 1 or verb in OVER_RANKS:
        return None
    able = ", ".join(OVER_RANKS)
    return (
        f"{verb} runs in one process, not in {ranks}. Start it without torchrun; {able} use ranks"
    )


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """What says how ranks share the work, under torchrun."""
    group = parser.add_argument_group("under torchrun")
    group.add_argument(
        "--ep", type=int, help="ranks that share the experts (as many as fit a node)"
    )
    group.add_argument(
        "--hybrid",
        action="store_true",
        default=None,
        help="divide dense weights within a node alone, a copy for each",
    )
    group.add_argument(
        "--precision",
        choices=("bfloat16",),
        help="of products; routers, norms and the weights that are trained stay in float32",
    )
    group.add_argument("--timeout", type=float, help="seconds that ranks wait for each other (600)")
    group.add_argument(
        "--heartbeat", type=float, help="seconds without a sign of life: a rank is lost (5)"
    )


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Within the block this process is one of torchrun's ranks; results come from rank 0 alone, and
    a lost rank is RankLost. Without torchrun nothing happens.

    Raises ConfigError for a flag of ranks where there are none, for one of a process alone where
    there are several, for an `--ep` that does not divide them, and for `--hybrid` on one node.
    """
    rank, ranks = world()
    _refuse_flags(arguments, ranks)
    if ranks == 1:
        yield
        return
    from moezoo.errors import RankLost
    from moezoo.functional.collective import node_size
    from moezoo.parallel import guard, join, leave
    from moezoo.parallel.meshes import check_ep, check_nodes

    if arguments.ep is not None:
        check_ep(arguments.ep, ranks)
    if arguments.hybrid:
        check_nodes(range(ranks), node_size(ranks))
    given = {name: getattr(arguments, name) for name in ("timeout", "heartbeat")}
    with ending_where_deaf(_MEETING, f"rank {rank}"):
        join(**{name: value for name, value in given.items() if value is not None})
    try:
        with (
            ending_where_deaf(_WORKING, f"rank {rank}"),
            guard(),
            _silent() if rank else contextlib.nullcontext(),
        ):
            yield
    except RankLost:
        raise  # a group that lost one is left by leaving the process
    except BaseException:
        leave()
        raise
    leave()


def _refuse_flags(arguments: argparse.Namespace, ranks: int) -> None:
    from moezoo.errors import ConfigError

    for name in _FLAGS if ranks == 1 else ():
        if getattr(arguments, name) is not None:
            hint = "Start with `torchrun --nproc-per-node N -m moezoo`; see docs/parallel.md."
            raise ConfigError(f"--{name} is for several ranks", field=name, hint=hint)
    for name in _ALONE if ranks > 1 else ():
        if getattr(arguments, name, False):
            raise ConfigError(f"--{name} is for one process", field=name, hint="Leave it out.")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield
        sys.stdout.flush()
