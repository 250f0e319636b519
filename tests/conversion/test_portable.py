"""Other systems than Linux: what they lack is taken away here, and everything works as before."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import moezoo
from moezoo.adapters.formats import open_source
from moezoo.adapters.open_files import OpenFiles
from moezoo.adapters.portable import locked
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from tests.conversion.dense import dense_t5
from tests.conversion.full_disk import contents
from tests.imports import ROOT, SOURCES, module_name, parsed

MACOS = ["fdatasync", "O_DIRECT", "posix_fallocate", "preadv", "pwritev", "copy_file_range"]
WINDOWS = [*MACOS, "pread", "pwrite", "statvfs", "ST_RDONLY", "O_CLOEXEC"]
# Windows opens no directory and has no library without a name.
LACKING = """
import ctypes, errno, os, shutil, sys
import torch
system, names, source, out = sys.argv[1], sys.argv[2].split(","), sys.argv[3], sys.argv[4]
usage = shutil.disk_usage(out)
for name in names:
    delattr(os, name)
if system == "windows":
    sys.modules["fcntl"] = None
    shutil._use_fd_functions, shutil.disk_usage = False, lambda path: usage
    opened = os.open
    def refusing(path, flags, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a directory", str(path))
        return opened(path, flags, *rest, **more)
    os.open = refusing
    library = ctypes.CDLL
    def named(name, *rest, **more):
        if name is None:
            raise TypeError("no library without a name")
        return library(name, *rest, **more)
    ctypes.CDLL = named
import moezoo
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
convert(source, f"{out}/made", Recipe(3, max_shard_size=20_000))
moezoo.save(moezoo.load(f"{out}/made"), f"{out}/saved")
moezoo.save(moezoo.load(f"{out}/saved"), f"{out}/saved", overwrite=True)
moezoo.downcycle(f"{out}/made", f"{out}/back")
"""


@pytest.mark.parametrize(("system", "lacks"), [("macos", MACOS), ("windows", WINDOWS)])
def test_a_system_without_some_calls_reads_and_writes_the_same_bytes(
    system: str, lacks: list[str], tmp_path: Path
) -> None:
    source = dense_t5(tmp_path / "dense")
    for name, names in (("linux", ""), (system, ",".join(lacks))):
        (tmp_path / name).mkdir()
        program = LACKING if names else LACKING.replace("delattr(os, name)", "pass")
        words = [name, names, str(source), str(tmp_path / name)]
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(contents(tmp_path / "linux")) > 10
    assert contents(tmp_path / system) == contents(tmp_path / "linux")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_calls_that_some_systems_lack_have_one_home(path: Path) -> None:
    if module_name(path) == "moezoo.adapters.portable":
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {f"os.{name}" for name in WINDOWS}
            assert node.attr != "CDLL"
        elif isinstance(node, ast.Import):
            assert "fcntl" not in {alias.name for alias in node.names}


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path) as first, locked(tmp_path) as second:
        assert (first, second) == (True, False)
    with locked(tmp_path) as again:
        assert again is True


def test_few_of_many_files_are_open_at_a_time_and_none_afterwards(tmp_path: Path) -> None:
    files, paths = OpenFiles(most=3), [tmp_path / str(number) for number in range(40)]
    before = len(os.listdir("/proc/self/fd"))
    for round_ in range(2):
        for path in paths:
            with files.use(path, os.O_RDWR | os.O_CREAT) as descriptor:
                assert os.pwrite(descriptor, b"x", round_) == 1
            assert len(os.listdir("/proc/self/fd")) <= before + 3
    with files.use(paths[0], os.O_RDONLY) as held:  # who is at it keeps it, whatever is closed
        files.close(paths[0])
        for path in paths:
            with files.use(path, os.O_RDONLY) as descriptor:
                assert os.pread(descriptor, 9, 0) == b"xx"
        assert os.pread(held, 9, 0) == b"xx"
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError), files.use(tmp_path / "none", os.O_RDONLY):
        pass


def test_threads_may_share_open_files(tmp_path: Path) -> None:
    files, errors = OpenFiles(most=2), []

    def work(number: int) -> None:
        try:
            for turn in range(200):
                path = tmp_path / str((number * 7 + turn) % 9)
                with files.use(path, os.O_RDWR | os.O_CREAT) as descriptor:
                    os.pwrite(descriptor, bytes([number]), number)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    assert errors == []
    assert all(path.read_bytes() == b"\0\1\2\3\4" for path in tmp_path.iterdir())


def test_more_shards_than_a_process_may_open_are_written_and_read(tmp_path: Path) -> None:
    code = """
import resource, sys, moezoo
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.upcycle.recipe import Recipe
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
convert(sys.argv[1], sys.argv[2], Recipe(8, max_shard_size=1))
export(sys.argv[2], sys.argv[3], max_shard_size=1)
moezoo.save(moezoo.load(sys.argv[2]), sys.argv[4])
"""
    source = dense_t5(tmp_path / "dense", num_layers=10)
    out, back, live = tmp_path / "out", tmp_path / "back", tmp_path / "live"
    command = [sys.executable, "-c", code, *map(str, (source, out, back, live))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.safetensors"))) > 200
    convert(source, tmp_path / "whole", Recipe(8))
    for made in (out, back, live):
        with open_source(made) as many, open_source(tmp_path / "whole") as one:
            assert set(many.tensors) == set(one.tensors)
            assert all(bytes(many.read(name)) == bytes(one.read(name)) for name in one.tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text on other systems")
def test_a_directory_whose_name_is_no_text_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"odd\xff")
    dense_t5(tmp_path / "dense").rename(path)
    assert moezoo.load(path).config.vocab_size == 61
