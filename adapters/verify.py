"""Proving that an upcycled checkpoint is what its recipe says and computes what its source did.

Levels 1 and 2 read bytes; 3 holds one layer in memory; 4 and 5 run both models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import DecoderConfig, ModelConfig
from moezoo.adapters.formats import Source
from moezoo.adapters.formats.files import quoted
from moezoo.adapters.plan import Move, Plan, make_plan
from moezoo.adapters.upcycle.drawing import router_bytes
from moezoo.adapters.upcycle.recipe import DTYPES, Recipe
from moezoo.adapters.upcycle.scaling import scale_bytes, widened
from moezoo.adapters.upcycle.slicing import cut, period, slice_targets
from moezoo.adapters.upcycle.tables import ROWS_OF_TOKENS, Step, same_table
from moezoo.adapters.upcycle.watch import source_hashes
from moezoo.adapters.verification import LEVELS, LevelResult, Verification
from moezoo.config import SwitchConfig
from moezoo.errors import CheckpointError, ConfigError

_CHUNK = 1 << 18
# What recipes meant that say nothing, before the source decided it (0.1.0 of November 2026).
_OPEN = {"router": "switch", "router_init": "normal"}


def verify(
    target: str | Path, against: str | Path, *, levels: Iterable[int] = tuple(LEVELS)
) -> Verification:
    """Verify the upcycled checkpoint `target` against the dense one it was made from.

    Args:
        levels: which of `verification.LEVELS` to run; all by default.

    A level that does not hold is a result, not an error. Raises ConfigError for unknown levels or a
    target without a recipe, CheckpointError for checkpoints that cannot be read.
    """
    wanted = sorted(set(levels))
    unknown = [level for level in wanted if level not in LEVELS]
    if unknown or not wanted:
        raise ConfigError(
            "unknown level of verification", field="levels", expected="1 to 5", found=unknown
        )
    with (
        open_checkpoint(target) as made,
        open_checkpoint(
            against, drop_heads=bool(_upcycling(made)[0].get("dropped_heads"))
        ) as source,
    ):
        plan = _resized(make_plan(source, recipe_of(made), layout=_layout(made)), made)
        results = [_run(level, plan, source, made) for level in wanted]
    return Verification(str(target), str(against), tuple(results))


def recipe_of(made: CheckpointSource) -> Recipe:
    """The recipe in an upcycled checkpoint's provenance, in the dtype that it was exported in.

    Raises ConfigError when there is none.
    """
    provenance, exports = _upcycling(made)
    opened = _OPEN if isinstance(made.config, SwitchConfig) else {}
    recipe = Recipe.from_dict({**opened, **provenance["recipe"]})
    exported = next((export["dtype"] for export in exports if export.get("dtype")), None)
    return recipe if exported is None else replace(recipe, dtype=exported)


def _upcycling(made: CheckpointSource) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The provenance of the upcycling, and that of the exports since, the last one first."""
    provenance: Any = made.description.values.get("moezoo_provenance")
    operation: Any = "something else"
    exports: list[Mapping[str, Any]] = []
    while isinstance(provenance, Mapping):
        operation = provenance.get("operation")
        if operation == "upcycle" and isinstance(provenance.get("recipe"), Mapping):
            return provenance, exports
        if operation != "export" or provenance.get("expert") is not None:
            break
        exports.append(provenance)
        before = provenance.get("made_from")
        provenance = before[0].get("provenance") if isinstance(before, list) and before else None
    raise ConfigError(
        f"config.json names no recipe: made by {quoted(operation)}, not by `moezoo upcycle`",
        field="moezoo_provenance",
        path=made.source.directory / "config.json",
        hint="Verify the upcycled model that it was made from.",
    )


def _resized(plan: Plan, made: CheckpointSource) -> Plan:
    """The plan of a model whose tables of tokens exports gave another number of rows."""
    sizes = [rows for _, rows in _steps(made) if rows is not None]
    if not sizes:
        return plan
    rows, left = sizes[-1], min(plan.source_config.vocab_size, *sizes)
    moves = [
        replace(move, targets=tuple(replace(t, shape=(rows, *t.shape[1:])) for t in move.targets))
        if move.parameter in ROWS_OF_TOKENS
        else move
        for move in plan.moves
    ]
    return replace(
        plan,
        config=plan.config.replace(vocab_size=rows),
        source_config=plan.source_config.replace(vocab_size=left),  # the tokens that both know
        moves=tuple(moves),
    )


def _steps(made: CheckpointSource) -> list[Step]:
    """The dtypes and numbers of rows that tables of tokens went through, the first one first."""
    upcycling, exports = _upcycling(made)
    dtypes = [Recipe.from_dict(upcycling["recipe"]).dtype, *(e["dtype"] for e in exports[::-1])]
    rows = [None, *(export.get("vocab_size") for export in exports[::-1])]
    return [
        (None if dtype is None else DTYPES[dtype], count)
        for dtype, count in zip(dtypes, rows, strict=True)
    ]


def _run(level: int, plan: Plan, source: CheckpointSource, made: CheckpointSource) -> LevelResult:
    if level == 1:
        return _static(plan, source, made)
    if level == 2:
        return _bytes(plan, source, made)
    # These need torch; the first two must not.
    if isinstance(plan.config, DecoderConfig):
        from moezoo.adapters import verify_decoder

        return verify_decoder.CHECKS[level](plan, source, made)
    from moezoo.adapters import verify_function

    checks = {
        3: verify_function.layers_agree,
        4: verify_function.logits_agree,
        5: verify_function.routers_are_healthy,
    }
    return checks[level](plan, source, made)


def _static(plan: Plan, source: CheckpointSource, made: CheckpointSource) -> LevelResult:
    lost, twice = _unaccounted(plan, source)
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.outputs()}
    found = {name: (info.dtype, info.shape) for name, info in made.source.tensors.items()}
    missing = sorted(set(expected) - set(found))
    invented = sorted(set(found) - set(expected))
    for name in _wide_routers(plan, made.source):
        expected[name] = ("F32", expected[name][1])
    changed = sorted(n for n in expected if n in found and expected[n] != found[n])
    here, there = _comparable(made.config), _comparable(plan.config)
    other = sorted(n for n in {**here, **there} if here.get(n) != there.get(n))
    problems = {"lost": lost, "taken twice": twice, "missing": missing, "invented": invented,
                "changed": changed}  # fmt: skip
    passed = not any(problems.values()) and not other
    problem = next(
        (f"{what} {names[0]}" for what, names in problems.items() if names),
        f"config.json disagrees with the recipe in {', '.join(other[:4])}" if other else "",
    )
    summary = f"{len(found)} tensors accounted for" if passed else f"static: {problem}"
    if passed and plan.left_out:
        reasons = sorted(set(plan.left_out.values()))
        summary += f" ({len(plan.left_out)} of the source left out: {', '.join(reasons)})"
    numbers: dict[str, Any] = {what: names[:20] for what, names in problems.items()}
    numbers |= {"tensors": len(found), "source_tensors": len(source.source.tensors)}
    return LevelResult(1, passed, summary, {**numbers, "left_out": dict(plan.left_out)})


def _unaccounted(plan: Plan, source: CheckpointSource) -> tuple[list[str], list[str]]:
    """Tensors of the source file that are neither converted nor left out for a reason, and those
    that are more than once.
    """
    taken = Counter([*(move.source.name for move in plan.moves), *plan.left_out])
    lost = [name for name in source.source.tensors if name not in taken]
    return lost, [name for name, times in taken.items() if times > 1]


def _comparable(config: ModelConfig) -> dict[str, Any]:
    """A config without what its file may say in other words, or is free to change."""
    if isinstance(config, DecoderConfig):
        return dict(config.comparable())
    layers = config.decoder_layers
    free = {"capacity": None, "expert_capacity": None, "router_losses": None, "wo_scale": None}
    told: dict[str, Any] = config.replace(**free, num_decoder_layers=layers).to_dict()
    return told


def _bytes(plan: Plan, source: CheckpointSource, made: CheckpointSource) -> LevelResult:
    known = _upcycling(made)[0].get("source_sha256", {})
    for name, value in source_hashes(source.source).items():
        if known.get(name) != value:
            summary = f"bytes: the source file {name} is not the one it was made from"
            return LevelResult(2, False, summary, {"file": name})
    compared = 0
    drawn: set[str] = set()
    steps = _steps(made)
    try:
        for move in plan.moves:
            compared += _compare(plan, move, source.source, made.source, drawn, steps)
        compared += _compare_routers(plan, made.source)
    except _Differs as difference:
        return LevelResult(2, False, f"bytes: {difference} differs", {"key": str(difference)})
    return LevelResult(2, True, f"{compared:,} bytes as they must be", {"bytes": compared})


class _Differs(Exception):
    """A tensor of the target is not what the plan says; its name is the message."""


def _compare(
    plan: Plan, move: Move, source: Source, made: Source, drawn: set[str], steps: list[Step]
) -> int:
    if move.parameter in ROWS_OF_TOKENS and any(rows is not None for _, rows in steps):
        for target in move.targets:
            if not same_table(source, move.source, made, target.name, steps):
                raise _Differs(target.name)
        return sum(target.nbytes for target in move.targets)
    streams = move.source.dtype == move.targets[0].dtype
    shared = _compare_shared(move, source, made)
    if streams and (move.layer is None or plan.init.streams):
        return shared + _compare_streamed(plan, move, source, made)
    from moezoo.adapters.upcycle import drawing

    if move.layer is None:
        content = drawing.converted(source, move)
        expected: Iterable[tuple[str, Any]] = [(target.name, content) for target in move.targets]
    elif move.layer in drawn:
        return shared
    else:
        drawn.add(move.layer)
        expected = drawing.expert_tensors(plan, move.layer, (source,))
    total = shared
    for name, content in expected:
        total += len(content)
        if memoryview(made.read(name)) != content:
            raise _Differs(name)
    return total


def _compare_routers(plan: Plan, made: Source) -> int:
    """Routers are what the seed draws; those fitted to sample text cannot be drawn again."""
    total = 0
    wide = _wide_routers(plan, made)
    drawn = {} if plan.router_init.needs_inputs else plan.routers
    expected = [(r, router_bytes(plan, layer, r, None)) for layer, r in drawn.items()]
    expected += [(c, plan.constant(c)) for held in plan.constants.values() for c in held]
    for tensor, content in expected:
        wanted = widened(content, tensor.dtype) if tensor.name in wide else bytes(content)
        if bytes(made.read(tensor.name)) != wanted:
            raise _Differs(tensor.name)
        total += len(wanted)
    return total


def _wide_routers(plan: Plan, made: Source) -> set[str]:
    """What transformers keeps of routers in float32, whatever the rest is in, and saves so."""
    if not isinstance(plan.config, DecoderConfig):
        return set()
    tensors = [*plan.routers.values(), *(c for held in plan.constants.values() for c in held)]
    names = (t.name for t in tensors if t.dtype in ("F16", "BF16"))
    return {n for n in names if n in made.tensors and made.info(n).dtype == "F32"}


def _compare_shared(move: Move, source: Source, made: Source) -> int:
    """The part of an expert that every token passes is the dense one, scaled."""
    if move.shared is None:
        return 0
    if move.source.dtype == move.shared.dtype:
        reader = _Reader(made, move.shared.name)
        for chunk in source.chunks(move.source.name, _CHUNK):
            expected = scale_bytes(chunk, move.source.dtype, move.shared_scale)
            if reader.take(len(expected)) != expected:
                raise _Differs(move.shared.name)
        return move.shared.nbytes
    from moezoo.adapters.upcycle import drawing

    if memoryview(made.read(move.shared.name)) != drawing.converted(
        source, move, move.shared_scale
    ):
        raise _Differs(move.shared.name)
    return move.shared.nbytes


def _compare_streamed(plan: Plan, move: Move, source: Source, made: Source) -> int:
    total = position = 0
    count, owners = slice_targets(plan, move)
    readers = {target.name: _Reader(made, target.name) for target in move.targets}
    for chunk in source.chunks(move.source.name, _CHUNK):
        scaled = scale_bytes(chunk, move.source.dtype, move.scale)
        for which, _, expected in cut(scaled, position, period=period(move), count=count):
            for target in owners[which]:
                if readers[target.name].take(len(expected)) != expected:
                    raise _Differs(target.name)
                total += len(expected)
        position += len(chunk)
    return total


class _Reader:
    """A tensor's bytes in order, as many at a time as are asked for."""

    def __init__(self, source: Source, name: str) -> None:
        self._chunks, self._rest = source.chunks(name, _CHUNK), b""

    def take(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        while len(self._rest) < count:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest += chunk
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def _layout(made: CheckpointSource) -> str:
    native = "moezoo" in made.description.family.model_types
    return "moezoo" if native else "huggingface"


def require(verification: Verification, target: str | Path) -> str:
    """The line of a verification that passed, before the result becomes `target`.

    Raises CheckpointError for one that did not.
    """
    if not verification.passed:
        hint = "Nothing was written. Without --verify it would be, as it is."
        raise CheckpointError(verification.line, path=target, hint=hint)
    return verification.line
