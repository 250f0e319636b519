"""Which layout of a model over GPUs is the fastest that fits."""

from __future__ import annotations

import math
from dataclasses import replace

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, did_you_mean
from moezoo.layouts.figures import Layout
from moezoo.layouts.machine import Machine, parsed_memory
from moezoo.layouts.problem import OPTIMIZERS, Problem
from moezoo.presets import preset

TASKS = ("conditional_generation", "model", "encoder")


def layout(
    name: str | SwitchConfig,
    *,
    gpus: int,
    ep: int | None = None,
    dense_over: int | None = None,
    memory: str | int = "80GB",
    optimizer: str = "adam",
    tokens: int = 8192,
    length: int = 512,
    task: str = "conditional_generation",
    recompute: bool = True,
    masked: bool = True,
    machine: Machine | None = None,
) -> Layout:
    """The figures of one layout.

    Args:
        name: of a preset, or a config. gpus: how many, one node or whole nodes.
        ep: over how many ranks a layer's experts are spread; None: as many as divide both.
        dense_over: over how many ranks dense weights are cut, all or those of a node; None: all.
        memory: of a GPU, as "80GB", or bytes.
        optimizer: "adam" (or "adamw"), "adafactor".
        tokens: of source and of target, each, that a rank computes on at once. length: of a
            sequence. task: as `build` takes it.
        recompute: blocks are computed again in backward. masked: batches have an attention mask.
        machine: what GPUs and networks reach; None: the defaults.

    Raises RegistryError for an unknown name, ConfigError for what is impossible.
    """
    problem = _problem(
        name, memory, optimizer, tokens, length, task, recompute, masked, machine or Machine()
    )
    _check_gpus(problem, gpus)
    chosen = ep
    if chosen is None:
        chosen = max(e for e in range(1, gpus + 1) if problem.refusal(gpus, e) is None)
    _check_whole("ep", chosen)
    reason = problem.refusal(gpus, chosen)
    if reason is not None:
        raise ConfigError(reason, field="ep")
    over = gpus if dense_over is None else dense_over
    allowed = sorted({gpus, min(gpus, problem.machine.node)})
    if over not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise ConfigError("bad dense_over", field="dense_over", expected=wanted, found=repr(over))
    found = problem.layout(gpus, chosen, over)
    if found.fits:
        spare = _gigabytes(found.limit - found.memory.total)
        return replace(found, reason=f"fits with {spare} to spare")
    return replace(found, reason=f"{_lack(found)}; {_who_fits(problem, gpus)}")


def plan(
    name: str | SwitchConfig,
    *,
    gpus: int,
    memory: str | int,
    optimizer: str = "adam",
    tokens: int = 8192,
    length: int = 512,
    task: str = "conditional_generation",
    recompute: bool = True,
    masked: bool = True,
    machine: Machine | None = None,
) -> list[Layout]:
    """Every layout of a model over so many GPUs, best first: those that fit by the time of a step,
    then the others by their memory. Where nothing fits, `.reason` of the first names the smallest
    power of two of GPUs that does.

    Arguments and errors are those of `layout`.
    """
    problem = _problem(
        name, memory, optimizer, tokens, length, task, recompute, masked, machine or Machine()
    )
    _check_gpus(problem, gpus)
    found = sorted(problem.candidates(gpus), key=_rank)
    best = found[0]
    if not best.fits:
        reason = f"{_lack(best)}; {_who_fits(problem, gpus)}"
        return [replace(best, reason=reason), *(replace(o, reason=_lack(o)) for o in found[1:])]
    fitting = sum(layout.fits for layout in found)
    first = "the only one that fits" if fitting == 1 else f"the fastest of {fitting} that fit"
    return [replace(best, reason=first), *(_compared(other, best) for other in found[1:])]


def _problem(
    name: str | SwitchConfig,
    memory: str | int,
    optimizer: str,
    tokens: int,
    length: int,
    task: str,
    recompute: bool,
    masked: bool,
    machine: Machine,
) -> Problem:
    config = name if isinstance(name, SwitchConfig) else preset(name)
    label = "config" if isinstance(name, SwitchConfig) else name
    if not isinstance(machine, Machine):
        wanted = "a moezoo.layouts.Machine"
        raise ConfigError("bad machine", field="machine", expected=wanted, found=repr(machine))
    for option, value, allowed in (("optimizer", optimizer, OPTIMIZERS), ("task", task, TASKS)):
        if value not in allowed:
            hint = did_you_mean(value, allowed)
            raise ConfigError(f"unknown {option} {value!r}", field=option, hint=hint)
    _check_whole("tokens", tokens)
    _check_whole("length", length)
    return Problem(
        label,
        config,
        parsed_memory(memory),
        optimizer,
        tokens,
        min(length, tokens),
        task,
        recompute,
        masked,
        machine,
    )


def _check_gpus(problem: Problem, gpus: int) -> None:
    """Refuse a number of GPUs that no layout is for, naming the next ones that have some."""
    _check_whole("gpus", gpus)

    def refusal(number: int) -> str | None:
        most = math.gcd(number, problem.config.num_experts or 1)
        reasons = [problem.refusal(number, ep) for ep in range(1, most + 1) if most % ep == 0]
        return None if None in reasons else reasons[-1]

    reason = refusal(gpus)
    if reason is None:
        return
    below = next((n for n in range(gpus - 1, 0, -1) if refusal(n) is None), None)
    above = next((n for n in range(gpus + 1, 2 * gpus + 1) if refusal(n) is None), None)
    near = " or ".join(str(n) for n in (below, above) if n is not None)
    raise ConfigError(f"no layout over {gpus} GPUs: {reason}", field="gpus", hint=f"Take {near}.")


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        wanted = "a whole number >= 1"
        raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))


def _rank(layout: Layout) -> tuple[bool, float, float]:
    if not layout.fits:
        return True, layout.memory.total, layout.time.total
    return False, layout.time.total, layout.memory.total


def _compared(other: Layout, best: Layout) -> Layout:
    """The layout with what it costs more than the best, and where."""
    if not other.fits:
        return replace(other, reason=_lack(other))
    more = other.time.total - best.time.total
    exposed = {
        "gathers": max(other.time.gathers - other.time.compute, 0)
        - max(best.time.gathers - best.time.compute, 0),
        "rows": other.time.rows - best.time.rows,
        "optimizer": other.time.optimizer - best.time.optimizer,
    }
    if more < _NOTHING * best.time.total:
        held = _gigabytes(other.memory.total - best.memory.total)
        return replace(other, reason=f"as fast, {held} more memory")
    part = max(exposed, key=lambda name: exposed[name])
    return replace(other, reason=f"{_PARTS[part]}, +{span(more)}")


_NOTHING = 1e-4  # a share of a step that is no difference
_PARTS = {
    "gathers": "gathers outlast compute",
    "rows": "rows travel longer",
    "optimizer": "the optimizer moves more",
}


def _lack(layout: Layout) -> str:
    need, limit = _gigabytes(layout.memory.total), _gigabytes(layout.limit)
    return f"needs {need}, has {limit}"


def _who_fits(problem: Problem, gpus: int) -> str:
    fewest = problem.fewest()
    if fewest is None:
        kept = _gigabytes(problem.activations.total)
        return f"no number of GPUs fits, {kept} are activations: fewer tokens"
    if fewest <= gpus:
        return f"{fewest} GPUs fit with another layout"
    return f"{fewest} GPUs are the fewest that fit"


def span(seconds: float) -> str:
    """Seconds of a step, with three digits."""
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
