"""The command line: `moezoo VERB ...`. One file per verb; nothing here imports torch.

A verb is a module `moezoo/cli/<verb>.py` (dashes become underscores) with two functions:

    configure(parser: argparse.ArgumentParser) -> None    adds its arguments; imports no torch
    run(arguments: argparse.Namespace) -> int              does the work; returns the exit code

and one line in `VERBS` below, so that `--help` reads no other module. Raise MoezooError for what
the user can mend: it is printed as one line, and its class decides the exit code (2 user error, 3
bad input, 4 write failed, 5 another rank is lost). Results go to standard output, progress and
errors to standard error. SIGINT and SIGTERM unwind the verb, so that its `with` blocks tidy up, and
give 130 and 143.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import errno
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from moezoo.cli.parser import Parser
from moezoo.cli.ranks import refusal, world
from moezoo.cli.signals import orderly_termination
from moezoo.cli.terminal import complain
from moezoo.errors import MoezooError

VERBS = {
    "list": "names of the models that `build` knows",
    "info": "parameters, FLOPs and bytes of a model, before anything is allocated",
    "layout": "memory, wire and time of a model over many GPUs, reckoned before any is rented",
    "zoo": "every router, capacity policy, expert container and loss, and what goes together",
    "plan": "what an upcycling would read, write and cost; reads headers only",
    "upcycle": "turn a dense T5 on disk into a Switch model",
    "verify": "prove that a converted model computes what its source computed",
    "downcycle": "turn an upcycled model back into the dense one",
    "grow": "turn a Switch model into one with more experts",
    "shrink": "merge or prune experts by a saved routing trace",
    "merge": "several fine-tuned T5s of one shape become the experts of one model",
    "export": "change layout or dtype, or take out single experts",
    "train": "pre-train by span corruption, from scratch or from a checkpoint",
    "finetune": "fine-tune on pairs: translation, summarisation, your own",
    "evaluate": "loss and task metrics of a checkpoint",
    "generate": "text from a checkpoint",
    "quantize": "what int8 weights would save and cost for a checkpoint, on a text",
    "report": "what experts do on a text, in a run and beside another model: a page, a table, JSON",
    "trace": "record where the tokens of a text go, for `shrink`",
    "demo": "the main job on the text that ships with Python, end to end",
    "doctor": "what this installation has and lacks",
}
INTERRUPTED, CLOSED_PIPE = 130, 141
_REQUIRED = ("torch", "einops", "sentencepiece", "safetensors", "numpy")
_WRITE_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. A reader that goes away (`| head`) is no error: nothing
    more is said, neither here nor at shutdown.
    """
    try:
        code = _answered(arguments)
    except BrokenPipeError:
        code = CLOSED_PIPE
    except SystemExit as left:  # argparse has printed help, or an error
        if _lost_output() is None or left.code:
            raise
        return CLOSED_PIPE
    lost = _lost_output()
    if lost is None or code:
        return code
    if isinstance(lost, BrokenPipeError):
        return CLOSED_PIPE
    complain(f"moezoo: {_line(lost)}")
    return _exit_code(lost)


def _lost_output() -> OSError | None:
    """Why the rest of the output cannot be written, if so; it is then forgotten."""
    lost = None
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:  # as it is when the caller has closed it
                stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            lost = error if stream is sys.stdout else None
    return lost


def _answered(arguments: Sequence[str] | None) -> int:
    # Not `list`: once imported, the verb of that name is an attribute of this package.
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is None:
        return _without_verb(words)
    if verb not in available():
        near = difflib.get_close_matches(verb, available(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        complain(f"moezoo: unknown verb {verb!r}.{hint} See `moezoo --help`.")
        return 2
    refused = refusal(verb)
    if refused is not None:
        if world()[0] == 0:
            complain(f"moezoo: {refused}.")
        return 2
    words.remove(verb)
    atexit.register(_leave_garbage)
    module = importlib.import_module(f"moezoo.cli.{verb}")
    parser = Parser(prog=f"moezoo {verb}", description=VERBS[verb], allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.configure(parser)
    parsed = parser.parsed(words)
    return _guarded(module.run, parsed)


def available() -> Sequence[str]:
    """The verbs whose module is there, in the order of `VERBS`."""
    here = os.path.dirname(__file__)
    return [verb for verb in VERBS if os.path.isfile(os.path.join(here, f"{verb}.py"))]


def _leave_garbage() -> None:
    """Let a process end without a search for garbage, which takes as long as many a verb.

    Not after torch: what its extensions hold complains when it is not collected.
    """
    if "torch" not in sys.modules:
        gc.freeze()


def _without_verb(words: Sequence[str]) -> int:
    if "--version" in words:
        from moezoo import __version__

        return _shown(f"moezoo {__version__}")
    unknown = [word for word in words if word not in ("-h", "--help")]
    verbs = [f"  {verb:<10} {VERBS[verb]}" for verb in available()]
    said = ["usage: moezoo VERB ...   (moezoo VERB --help tells more)\n", *verbs]
    if words and not unknown:
        return _shown("\n".join(said))
    complain("\n".join([*(f"moezoo: unknown option {word}" for word in unknown[:1]), *said]))
    return 2


def _shown(text: str) -> int:
    """Print it; the exit code."""
    try:
        print(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f"moezoo: {_line(error)}")
        return _exit_code(error)
    return 0


def _guarded(run: Callable[[argparse.Namespace], int], parsed: argparse.Namespace) -> int:
    """Run a verb; an error becomes one line and an exit code."""
    try:
        with orderly_termination():
            return run(parsed)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        complain("moezoo: interrupted")
        return INTERRUPTED
    except Exception as error:
        if parsed.debug:
            raise
        rank, ranks = world()
        complain(f"moezoo: rank {rank}: {_line(error)}" if ranks > 1 else f"moezoo: {_line(error)}")
        return _exit_code(error)


def _line(error: Exception) -> str:
    if isinstance(error, MoezooError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file system'}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError) and error.name in _REQUIRED:
        return f"{error.name} is not installed: pip install {error.name}, then `moezoo doctor`"
    kind = type(error).__name__
    return f"internal error, {kind}: {error}. Run again with --debug for the traceback."


def _exit_code(error: Exception) -> int:
    if isinstance(error, MoezooError):
        return error.exit_code
    if isinstance(error, OSError):
        return 4 if error.errno in _WRITE_FAILURES else 3
    if isinstance(error, ModuleNotFoundError) and error.name in _REQUIRED:
        return 3
    return 3 if isinstance(error, MemoryError) else 1
