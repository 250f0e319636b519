"""The command line answers in one line, with the right exit code, and without importing torch."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from moezoo import cli
from moezoo.errors import ConfigError, CorruptFile, SaveError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A verb `info` whose `run` a test sets."""
    module = types.ModuleType("moezoo.cli.info")
    module.configure = lambda parser: parser.add_argument("--length")
    monkeypatch.setitem(sys.modules, "moezoo.cli.info", module)
    return module


def failing(error: BaseException) -> object:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("bad option"), 2, "bad option"),
        (CorruptFile("is cut short", path="a.bin"), 3, "a.bin: is cut short"),
        (SaveError("disk full"), 4, "disk full"),
        (OSError(28, "No space left on device", "out"), 4, "out: No space left on device"),
        (PermissionError(13, "Permission denied", "in"), 3, "in: Permission denied"),
        (MemoryError(), 3, "out of memory"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            3,
            "torch is not installed: pip install torch, then `moezoo doctor`",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("x"), 1, "internal error, KeyError: 'x'. Run again with --debug"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], error: BaseException, code: int,
    text: str,
) -> None:  # fmt: skip
    verb.run = failing(error)
    assert cli.main(["info"]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"moezoo: {text}")
    assert said.count("\n") == 1


def test_debug_shows_the_traceback(verb: types.ModuleType) -> None:
    verb.run = failing(ConfigError("bad option"))
    with pytest.raises(ConfigError):
        cli.main(["info", "--debug"])


def test_sigterm_unwinds_the_verb(verb: types.ModuleType) -> None:
    tidied = []

    def run(arguments: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return signal.pause() or 0
        finally:
            tidied.append(True)

    verb.run = run
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        cli.main(["info"])
    assert (left.value.code, tidied) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["infos"], "unknown verb 'infos'. Did you mean 'info'?"),
        (["info", "--lenght", "3", "t5-small"], "Did you mean --length?"),
        (["info", "--len", "3", "t5-small"], "unrecognized arguments: --len"),
        (["--wat"], "unknown option --wat"),
        (["info"], "the following arguments are required: model"),
    ],
)
def test_a_mistyped_command_names_the_nearest(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(words)
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert text in capsys.readouterr().err


def test_help_names_every_verb_and_imports_no_torch() -> None:
    code = "import sys\nfrom moezoo.cli import main\nassert main(['--help']) == 0\n"
    code += "assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(f"  {verb} " in done.stdout for verb in cli.available())


@pytest.mark.parametrize("verb_name", cli.available())
def test_the_help_of_a_verb_imports_no_torch(verb_name: str) -> None:
    code = f"import sys\nfrom moezoo.cli import main\ntry:\n    main([{verb_name!r}, '--help'])\n"
    code += (
        "except SystemExit as left:\n    assert left.code == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_closed_output_is_no_error() -> None:
    command = f"{sys.executable} -m moezoo list >&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m moezoo list | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "output", "code"),
    [
        ("--help", "stdout", 141),
        ("--version", "stdout", 141),
        ("list", "stdout", 141),
        ("list --help", "stdout", None),
        ("zoo --json", "stdout", 141),
        ("nonsense", "stdout", 2),
        ("info nonsense", "stdout", 2),
        ("", "stderr", 2),
        ("nonsense", "stderr", 2),
        ("info", "stderr", 2),
        ("info nonsense", "stderr", 2),
        ("list", "stderr", 0),
    ],
)
def test_a_reader_that_has_gone_is_met_in_silence(
    words: str, output: str, code: int | None
) -> None:
    read, write = os.pipe()
    os.close(read)
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, output: write}
    command = [sys.executable, "-m", "moezoo", *words.split()]
    done = subprocess.run(command, cwd=ROOT, text=True, **streams)  # type: ignore[call-overload]
    os.close(write)
    # argparse forgets by itself what it cannot write at once, and then all is well.
    assert done.returncode in ((0, 141) if code is None else (code,))
    assert "Error" not in (done.stderr or "") and "xception" not in (done.stderr or "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full here")
@pytest.mark.parametrize("words", ["--help", "list"])
def test_output_that_has_no_room_is_an_error(words: str) -> None:
    command = f"{sys.executable} -m moezoo {words} > /dev/full"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "No space left" in done.stderr


def test_info_tells_the_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "switch-large-128", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 26_309_291_008


def test_info_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "switch-base-8"]) == 0
    said = capsys.readouterr().out
    for row in ("parameters", "active per token", "FLOPs per token", "bytes in bfloat16"):
        assert row in said
    assert "1, 3, 5, 7, 9, 11" in said


def test_list_takes_a_pattern_and_refuses_an_empty_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "switch-base-*"]) == 0
    assert capsys.readouterr().out.split()[0] == "switch-base-8"
    assert cli.main(["list", "nothing-*"]) == 2


def test_zoo_names_every_component(capsys: pytest.CaptureFixture[str]) -> None:
    from moezoo import capacity, experts, losses, routers

    assert cli.main(["zoo"]) == 0
    said = capsys.readouterr().out
    for registry in (routers, capacity, experts, losses):
        assert all(name in said for name in registry.names())
    assert cli.main(["zoo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["routers"] == routers.names()


def test_doctor_finds_what_the_tests_run_on(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert cli.main(["doctor", "--json"]) == 0
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    # An installed wheel of the index is 2.13.0 and calls itself 2.13.0+cu130.
    assert found["torch"]["found"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["torch"]["verdict"] == "ok"


def test_doctor_looks_for_what_pyproject_asks_for() -> None:
    from moezoo.cli.doctor import EXTRAS, REQUIRED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split("[<>=]", text)[0]: text for text in project["dependencies"]}
    assert set(REQUIRED) == set(wanted)
    for name, least in REQUIRED.items():
        assert wanted[name] == name + (">=" + ".".join(map(str, least)) if least else "")
    for extra, names in EXTRAS.items():
        asked = project["optional-dependencies"][extra]
        assert set(names) == {re.split("[<>=]", text)[0] for text in asked}


@pytest.mark.parametrize("verb_name", cli.available())
def test_every_option_of_a_verb_says_what_it_does(verb_name: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"moezoo.cli.{verb_name}").configure(parser)
    silent = [action.dest for action in parser._actions if not action.help]
    assert silent == []
