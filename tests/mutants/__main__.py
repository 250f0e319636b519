"""Run tests against seeded bugs: `python -m tests.mutants [--quick] [WORD ...]`.

Each bug goes into a copy of the package of its own; torch is imported once and every copy is tested
in a forked process. A bug is caught when a test fails: an error in the machinery does not count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import hypothesis  # noqa: F401  (imported before forking, like pytest and torch)
import pytest
import torch

from tests.mutants.bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[2]
CORE = [
    "tests/properties/test_references.py",
    "tests/properties/test_in_use.py",
    "tests/properties/test_configs.py",
    "tests/properties/test_generation.py",
    "tests/mutants/kit.py",
    "tests/observed/test_taken.py",
    "tests/test_text_files.py",
    "tests/training/test_adafactor.py",
]
# Which tests see bugs of a part at once; where they don't, all others are asked.
NEAR = {
    "adapters/families/": ["tests/properties/test_decoders.py"],
    "adapters/tensor_files.py": ["tests/properties/test_decoders.py"],
    "adapters/upcycle/grow.py": ["tests/properties/test_decoders.py"],
    "adapters/upcycle/shrink.py": ["tests/conversion/test_decoder_reshaping.py"],
    "adapters/upcycle/downcycling.py": [
        "tests/conversion/test_decoder_reshaping.py",
        "tests/conversion/test_decoder_resaved.py",
    ],
    "adapters/upcycle/folding.py": ["tests/conversion/test_settled.py"],
    "adapters/upcycle/target.py": ["tests/conversion/test_settled.py"],
    "adapters/mlp_form.py": ["tests/adapters/test_stacked_plugs.py"],
    "adapters/probe.py": ["tests/adapters/test_plug_refusals.py"],
    "adapters/sparse.py": ["tests/adapters/test_plug.py"],
    "adapters/plug.py": ["tests/adapters/test_plugged_checkpoints.py"],
    "moezoo/training/recipes.py": ["tests/conversion/test_settled.py"],
    "moezoo/functional/routed_mlp.py": ["tests/functional/test_routed_mlp.py"],
    "moezoo/functional/expert_strips.py": ["tests/functional/test_routed_mlp.py"],
    "moezoo/functional/batch_products.py": ["tests/functional/test_routed_mlp.py"],
    "moezoo/functional/composed_mlp.py": ["tests/experts/test_biases.py"],
    "moezoo/functional/grouped_mlp.py": ["tests/experts/test_biases.py"],
    "moezoo/quantization.py": ["tests/experts/test_biases.py"],
    "moezoo/ops/products.py": ["tests/ops/test_products.py"],
    "moezoo/layer.py": ["tests/models/test_step.py"],
    "moezoo/models/step.py": ["tests/models/test_step.py", "tests/models/test_graph_step.py"],
    "moezoo/models/graph_step.py": ["tests/models/test_graph_step.py"],
    "moezoo/layouts/": ["tests/layouts/test_planner.py"],
    "moezoo/reporting/": ["tests/reporting/test_known.py"],
    "moezoo/capacity/base.py": ["tests/reporting/test_known.py"],
    "moezoo/cli/parser.py": ["tests/cli/test_grammar.py"],
    "moezoo/config.py": ["tests/test_config.py"],
    "moezoo/dtypes.py": ["tests/test_first_mistakes.py"],
    "moezoo/registry.py": ["tests/test_first_mistakes.py"],
    "moezoo/training/smoothing.py": ["tests/training/test_smoothing.py"],
    "adapters/padding.py": ["tests/adapters/test_plug_masks.py"],
    "adapters/hf/": ["tests/mutants/wrapped.py"],
    "adapters/hf/routers.py": ["tests/hf/test_recording.py"],
    "moezoo/recording.py": ["tests/mutants/kit.py", "tests/hf/test_recording.py"],
}
OF_RANKS = ["tests/mutants/ranks_kit.py", "tests/mutants/training_kit.py"]
PASSED, FAILED = int(pytest.ExitCode.OK), int(pytest.ExitCode.TESTS_FAILED)


def main(words: list[str]) -> int:
    """Print caught / total; 0 when every bug is caught and the sound package passes."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="the small selection")
    parser.add_argument("names", nargs="*", metavar="WORD", help="bugs with one of these words")
    options = parser.parse_args(words)
    chosen = [bug for bug in BUGS if bug.quick or not options.quick]
    chosen = [bug for bug in chosen if any(name in bug.name for name in options.names or [""])]
    if not chosen:
        parser.error(f"no bug has one of these words: {' '.join(options.names)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for ranks in {bug.ranks for bug in chosen}:
            if outcome(None, Path(folder) / "sound", ranks=ranks) != PASSED:
                print("the suite fails on the sound package: nothing can be said about bugs")
                return 1
        jobs = [(bug, Path(folder) / str(number)) for number, bug in enumerate(chosen)]
        start, caught = time.monotonic(), 0
        for (bug, _), code in zip(jobs, pool.map(lambda job: outcome(*job), jobs), strict=True):
            caught += code == FAILED
            verdict = "caught" if code == FAILED else f"ESCAPED (exit {code})"
            print(f"{verdict:8} {bug.name}{' (historic)' if bug.historic else ''}", flush=True)
    print(f"caught {caught} / {len(chosen)} in {time.monotonic() - start:.0f} s")
    return 0 if caught == len(chosen) else 1


def outcome(bug: Bug | None, copy: Path, *, ranks: bool = False) -> int:
    """pytest's exit code for the property tests on a copy of the package with the bug in it, or for
    those of several ranks.
    """
    copy.mkdir()
    for name in ("moezoo", "adapters", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    if bug is not None:
        seed(bug, copy)
    child = os.fork()
    if child == 0:
        code = int(pytest.ExitCode.INTERNAL_ERROR)
        try:
            for suite in [OF_RANKS] if ranks or (bug and bug.ranks) else suites(bug):
                code = _tested(copy, suite)
                if code != PASSED:
                    break
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(copy)
    return os.waitstatus_to_exitcode(status)


def suites(bug: Bug | None) -> list[list[str]]:
    """The test files in the order in which they are asked, those that stand near a bug first."""
    near: list[str] = []
    if bug is not None:
        near = next((NEAR[path] for path in _longest(NEAR) if bug.path.startswith(path)), [])
    far = dict.fromkeys(file for files in NEAR.values() for file in files if file not in near)
    return [files for files in (near, [f for f in CORE if f not in near],
                                [f for f in far if f not in CORE]) if files]  # fmt: skip


def _longest(paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=len, reverse=True)


def seed(bug: Bug, root: Path) -> None:
    """Write the bug into a source tree. Raises ValueError where its place is not unique."""
    path = root / bug.path
    text = path.read_text()
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: {bug.old!r} occurs {text.count(bug.old)} times in {path}")
    path.write_text(text.replace(bug.old, bug.new))


def _tested(copy: Path, suite: list[str]) -> int:
    """In the forked process: forget this package, run the suite on the copy."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("moezoo", "tests", "adapters")]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"  # caught in every run, or in none
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--import-mode=importlib"]
    flags += ["-W", "ignore:Module already imported"]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return int(pytest.main([*flags, "--rootdir", str(copy), *suite]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
