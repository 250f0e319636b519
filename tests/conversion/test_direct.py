"""What goes past the system's cache arrives as if it had gone through it."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import moezoo
from moezoo.adapters import portable
from moezoo.adapters.direct import LARGEST, LENT, PAGE, DirectFile, DirectWriter, direct_flags
from moezoo.adapters.formats.safetensors import read_header
from moezoo.adapters.tensor_files import TensorFile, TensorPlan
from moezoo.errors import NonFiniteWeights, SaveError
from tests.conversion.dense import dense_t5

_SIZES = st.sampled_from(
    [1, 100, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, LARGEST, LARGEST + 3 * PAGE + 7]
)
Pwrite = Callable[[int, Any, int], int]


def _refusing(write: Pwrite) -> Pwrite:
    """A file system that opens files for direct writes and then takes none."""

    def pwrite(descriptor: int, content: Any, position: int) -> int:
        if len(content) >= PAGE:
            raise OSError(errno.EINVAL, "not here")
        return write(descriptor, content, position)

    return pwrite


def _halving(write: Pwrite) -> Pwrite:
    """A system that writes less than it is asked to, in the middle of a page."""

    def pwrite(descriptor: int, content: Any, position: int) -> int:
        return write(descriptor, content[: (len(content) + 1) // 2], position)

    return pwrite


@pytest.fixture(params=["as it is", "refused", "halved"])
def descriptors(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, int]]:
    path = tmp_path / "file"
    plain = os.open(path, os.O_RDWR | os.O_CREAT)
    # Refusals and short writes are made by us, on a file that takes unaligned writes.
    way = request.param
    flags = direct_flags(path) if way == "as it is" else os.O_WRONLY
    if flags is None:
        os.close(plain)
        pytest.skip("this file system has no direct writes")
    past = os.open(path, flags)
    if way != "as it is":
        wrap = _refusing if way == "refused" else _halving
        write = wrap(os.pwrite)
        monkeypatch.setattr(portable, "os", _System(past, write))
    yield plain, past
    os.close(plain)
    os.close(past)


class _System:
    """`os`, whose `pwrite` to one descriptor is another."""

    def __init__(self, descriptor: int, write: Pwrite) -> None:
        self._descriptor, self._write = descriptor, write

    def pwrite(self, descriptor: int, content: Any, position: int) -> int:
        write = self._write if descriptor == self._descriptor else os.pwrite
        return write(descriptor, content, position)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sizes=st.lists(_SIZES, min_size=1, max_size=6),
    starts=st.lists(st.sampled_from([0, 1, 512, PAGE, 3 * PAGE + 5]), min_size=1, max_size=10),
)
def test_every_place_holds_what_was_written_to_it(
    descriptors: tuple[int, int], sizes: list[int], starts: list[int]
) -> None:
    plain, past = descriptors
    os.ftruncate(plain, 0)
    file = DirectFile(lambda: nullcontext(plain), lambda: nullcontext(past))
    content = os.urandom(sum(sizes))
    gap = len(content) + 100
    bases = [start + place * gap for place, start in enumerate(sorted(starts))]
    expected = bytearray(bases[-1] + len(content))
    with DirectWriter() as writer:
        done = 0
        for size in sizes:
            part = bytearray(content[done : done + size])
            writer.write([(file, base + done) for base in bases], memoryview(part))
            part[:] = bytes(size)  # what was handed over may change
            done += size
        writer.finish()
    for base in bases:
        expected[base : base + len(content)] = content
    assert os.pread(plain, len(expected) + 1, 0) == bytes(expected)


def test_an_error_of_the_disk_comes_out_and_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, content: Any, position: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    with (tmp_path / "file").open("w+b") as opened, DirectWriter() as writer:
        file = DirectFile(
            lambda: nullcontext(opened.fileno()), lambda: nullcontext(opened.fileno())
        )
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="full"):
            for start in range(100):  # more than there are buffers: none is lost to an error
                writer.write([(file, start * LARGEST)], bytes(LARGEST))
            writer.finish()


@pytest.mark.parametrize("good", [0, 1, 5, 30])
def test_an_error_amid_lent_memory_leaves_nothing_and_no_thread(
    good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = itertools.count()

    def filling(file: DirectFile, content: memoryview, position: int) -> None:
        if next(writes) >= good:
            raise OSError(errno.ENOSPC, "full")

    source = dense_t5(tmp_path / "dense", d_model=64, d_ff=20 * LENT // 64 // 4)
    monkeypatch.setattr(DirectFile, "write", filling)
    threads = threading.active_count()
    with pytest.raises(SaveError, match="the disk is full"):
        moezoo.upcycle(source, tmp_path / "out", num_experts=3)
    assert threading.active_count() == threads
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_infinity_in_lent_memory_is_found(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense", d_model=64, d_ff=5120)
    file = source / "model.safetensors"
    tensors, _ = read_header(file)
    info = next(info for name, info in tensors.items() if name.endswith("DenseReluDense.wo.weight"))
    for place in (0, LENT - 4, LENT, info.nbytes - 4):
        with file.open("r+b") as opened:
            opened.seek(info.offset + place)
            before = opened.read(4)
            opened.seek(info.offset + place)
            opened.write(b"\0\0\x80\xff")
        with pytest.raises(NonFiniteWeights, match="wo.weight"):
            moezoo.upcycle(source, tmp_path / "out", num_experts=3)
        with file.open("r+b") as opened:
            opened.seek(info.offset + place)
            opened.write(before)
    moezoo.upcycle(source, tmp_path / "out", num_experts=3)


def test_who_waits_for_memory_is_told_when_nobody_writes_any_more() -> None:
    with DirectWriter() as writer:
        with writer.lending():
            first = writer.lend()
            first.hold()
            first.release()
            others = {id(writer.lend()) for _ in range(7)}
            assert id(first) not in others and len(others) == 7
            first.release()
            assert writer.lend() is first
        for _ in range(2):
            with pytest.raises(RuntimeError, match="nobody writes"):
                writer.lend()


def test_tensors_begin_at_multiples_of_what_their_sizes_are_multiples_of(tmp_path: Path) -> None:
    plans = [
        TensorPlan("norm", "F32", (3,)),
        TensorPlan("wide", "F32", (2, PAGE // 4)),
        TensorPlan("half", "F16", (5,)),
        TensorPlan("scale", "F32", ()),
        TensorPlan("small", "F32", (3, 16)),
        TensorPlan("wider", "F32", (PAGE,)),
    ]
    contents = {plan.name: os.urandom(plan.nbytes) for plan in plans}
    file = TensorFile(tmp_path / "model.safetensors", plans, {"format": "pt"}, direct=True)
    for plan in plans:
        for size in (4, 64, PAGE):
            assert plan.nbytes % size or file.claim(plan.name, 0) % size == 0
        file.put(plan.name, contents[plan.name])
    file.close()
    with safe_open(tmp_path / "model.safetensors", "pt") as found:
        assert set(found.keys()) == set(contents)
        for name, content in contents.items():
            assert found.get_tensor(name).numpy().tobytes() == content


@pytest.mark.parametrize("worth_lending", [PAGE, 1 << 40])
@pytest.mark.parametrize("d_ff", [256, 24 * 7, 5120])  # of whole pages, of others, beyond LENT
def test_both_ways_write_the_same_bytes(
    d_ff: int, worth_lending: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moezoo.adapters.upcycle.stream._WORTH_LENDING", worth_lending)
    source = dense_t5(tmp_path / "dense", d_model=64, d_ff=d_ff)
    for way in ("1", "0"):
        monkeypatch.setenv("MOEZOO_DIRECT_IO", way)
        moezoo.upcycle(source, tmp_path / way, num_experts=3, max_shard_size=500_000)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "0" / path.name).read_bytes(), path.name


def test_a_disk_too_full_for_the_file_says_so_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    source = dense_t5(tmp_path / "dense")
    monkeypatch.setattr("moezoo.adapters.tensor_files.allocate", none_left)
    with pytest.raises(SaveError, match="the disk is full"):
        moezoo.upcycle(source, tmp_path / "out", num_experts=3)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
