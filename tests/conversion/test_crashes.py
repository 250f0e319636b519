"""Killed, interrupted or out of space at any point: the target is wholly old or wholly new."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import moezoo
from moezoo.adapters.checkpoint import read_config
from moezoo.adapters.tensor_files import TensorPlan, write_tensors
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.writer import replacing_directory, replacing_file
from moezoo.errors import SaveError, TargetExists
from tests.conversion.dense import dense_t5

# Everything by which the writer changes the disk goes through these functions of `os`.
CHANGES = ("open", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "mkdir", "rename",
           "replace", "rmdir", "unlink")  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_t5(tmp_path_factory.mktemp("dense") / "t5", num_layers=2)


def at_change(number: int, act: Callable[[], None]) -> list[str]:
    """From now on, `act` before the `number`-th change of the disk. Returns what was called."""
    calls: list[str] = []
    for name in CHANGES:
        original = getattr(os, name)

        def counted(*args: object, _original: object = original, _name: str = name, **more: object):  # type: ignore[no-untyped-def]
            calls.append(_name)
            if len(calls) == number:
                act()
            return _original(*args, **more)  # type: ignore[operator]

        setattr(os, name, counted)
    return calls


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; the status that it ends with."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def killed_at(number: int, work: Callable[[], object]) -> int:
    """Run `work` in a forked process that is killed at the `number`-th change of the disk."""

    def doomed() -> None:
        at_change(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        work()

    return in_child(doomed)


def save(target: Path, content: bytes) -> None:
    with replacing_directory(target, overwrite=True) as stage:
        plan = TensorPlan("w", "U8", (len(content),))
        write_tensors(stage, {"w": (plan, content)})
        (stage / "config.json").write_bytes(content)


def saved(target: Path) -> bytes:
    """What a saved directory holds; both of its files must agree."""
    config = (target / "config.json").read_bytes()
    assert (target / "model.safetensors").read_bytes().endswith(config)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    return config


def test_a_save_killed_at_any_change_leaves_old_or_new(tmp_path: Path) -> None:
    target, outcomes, number = tmp_path / "out", set(), 0
    while True:
        number += 1
        save(target, b"old content")
        status = killed_at(number, lambda: save(target, b"new content"))
        outcomes.add(saved(target))
        if not os.WIFSIGNALED(status):
            break
    assert number > 10 and outcomes == {b"old content", b"new content"}
    save(target, b"last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # leftovers were swept


@pytest.mark.parametrize(("direct", "changes"), [("1", 30), ("0", 70)])
def test_a_conversion_killed_at_any_change_leaves_nothing_or_resumes(
    direct: str, changes: int, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEZOO_DIRECT_IO", direct)
    convert(t5, tmp_path / "expected", Recipe(2))
    expected = {p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()}
    place = tmp_path / "place"
    place.mkdir()
    number, resumed = 0, 0
    while True:
        number += 1
        target = place / "out"
        status = killed_at(number, lambda: convert(t5, place / "out", Recipe(2)))
        finished = target.exists()
        if finished:
            assert {p.name: p.read_bytes() for p in target.iterdir()} == expected
        if not os.WIFSIGNALED(status):
            break
        assert not finished or number > changes - 20
        report = convert(t5, target, Recipe(2), overwrite=finished)
        resumed += report.resumed
        assert {p.name: p.read_bytes() for p in target.iterdir()} == expected
        assert [p.name for p in place.iterdir()] == ["out"]
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
    assert number > changes and resumed > changes - 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_at_any_change_is_typed_and_leaves_the_old_data(
    code: int, t5: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    save(target, b"old content")

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    def attempt(number: int) -> None:
        at_change(number, fail)
        try:
            save(target, b"new content")
        except SaveError as error:
            assert str(target) in str(error) and error.exit_code == 4
            os._exit(7)

    codes = set()
    for number in range(1, 40):
        codes.add(os.waitstatus_to_exitcode(in_child(partial(attempt, number))))
        assert saved(target) in (b"old content", b"new content")
    assert codes == {0, 7}
    save(target, b"last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_size_limit_is_a_typed_error_and_leaves_nothing(t5: Path, tmp_path: Path) -> None:
    def attempt() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            convert(t5, tmp_path / "out", Recipe(8))
        except SaveError as error:
            assert "ulimit" in str(error) and "bytes are needed" in str(error)
            os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(attempt)) == 7
    assert list(tmp_path.iterdir()) == []


def test_200_kills_at_random_moments_lose_nothing(t5: Path, tmp_path: Path) -> None:
    target, chance = tmp_path / "out", random.Random(0)
    convert(t5, target, Recipe(2))
    whole = 1.0  # seconds of a conversion, so that kills fall into one on any machine
    for _ in range(3):
        began = time.perf_counter()
        convert(t5, target, Recipe(2), overwrite=True)
        whole = min(whole, time.perf_counter() - began)
    outcomes = {2: 0, 3: 0}
    for _ in range(200):
        child = os.fork()
        if child == 0:
            try:
                convert(t5, target, Recipe(3), overwrite=True)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        files = {path.name for path in target.iterdir()}
        assert {"config.json", "model.safetensors", "README.md"} <= files
        assert not any(name.startswith(".") for name in files)
        outcomes[read_config(target).num_experts] += 1
        if outcomes[3] and chance.random() < 0.3:
            convert(t5, target, Recipe(2), overwrite=True)
    assert outcomes[2] > 20
    convert(t5, target, Recipe(3), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_and_says_so(
    number: int, code: int, t5: Path, tmp_path: Path
) -> None:
    program = (
        "import os, signal, sys\n"
        "from moezoo.cli import main, terminal\n"
        # A shell's background job starts with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "calls = []\n"
        "def advance(self, amount=1, note=''):\n"
        "    calls.append(amount)\n"
        f"    if len(calls) == 20: os.kill(os.getpid(), {int(number)})\n"
        "terminal.Progress.advance = advance\n"
        f"sys.exit(main(['upcycle', {str(t5)!r}, {str(tmp_path / 'out')!r}, '--experts', '4']))\n"
    )
    root = Path(moezoo.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_two_conversions_into_one_place_do_not_mix(t5: Path, tmp_path: Path) -> None:
    from moezoo.adapters.writer import locked

    (tmp_path / "out.partial").mkdir()
    with locked(tmp_path / "out.partial") as free:
        assert free
        with pytest.raises(SaveError, match="another conversion"):
            convert(t5, tmp_path / "out", Recipe(2))
    convert(t5, tmp_path / "out", Recipe(2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_partial_of_another_recipe_is_not_used(t5: Path, tmp_path: Path) -> None:
    killed_at(20, lambda: convert(t5, tmp_path / "out", Recipe(2)))
    assert (tmp_path / "out.partial").is_dir()
    report = convert(t5, tmp_path / "out", Recipe(3))
    assert not report.resumed and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_single_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replacing_file(target) as stage:
        stage.write_bytes(b"one")
    with pytest.raises(TargetExists, match="exists already"), replacing_file(target) as stage:
        stage.write_bytes(b"two")
    with pytest.raises(KeyError), replacing_file(target, overwrite=True) as stage:
        stage.write_bytes(b"three")
        raise KeyError
    assert target.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with replacing_file(target, overwrite=True) as stage:
        stage.write_bytes(b"four")
    assert target.read_bytes() == b"four" and target.stat().st_mode & 0o111 == 0


def test_a_missing_or_forbidden_place_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(SaveError), replacing_directory(place):
            raise AssertionError("work was begun")
    with replacing_directory(tmp_path / "made" / "for" / "it") as stage:
        (stage / "a").write_text("a")
    assert (tmp_path / "made/for/it/a").exists()


def test_too_little_space_is_refused_before_any_work(tmp_path: Path) -> None:
    with (
        pytest.raises(SaveError, match="too full"),
        replacing_directory(tmp_path / "out", bytes_needed=2**62),
    ):
        raise AssertionError("work was begun")
