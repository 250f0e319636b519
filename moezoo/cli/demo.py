"""`moezoo demo`: text, tokenizer, dense T5, Switch, table, picture and routing, in one go."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from moezoo.cli.terminal import Progress, duration, table
from moezoo.demonstration.effort import USUAL

if TYPE_CHECKING:
    from moezoo.demonstration.closed_book import Book
    from moezoo.demonstration.text import Material, OnStep
    from moezoo.reporting.trial import Curve, Trial
    from moezoo.training.loop import StepRecord

TOLERANCE = 1e-4
ORDER = "Another order of batches moves this by a few hundredths of a nat."
MARK = "made-by-moezoo-demo.txt"
WHAT = {
    "steps": "of each training on facts",
    "text_steps": "of the dense model on text",
    "further": "of both models on text",
}
NOTES = (
    "Facts reward parameters more than any other task: no fact follows from another.",
    "A token of the Switch model uses one expert of each layer, hardly more parameters than in the "
    "dense model; but all experts lie in memory, with the optimizer's state for them, and finding "
    "each token's expert takes time: the smaller the model, the larger its share of a step.",
    "Both curves dip at first: the learning rate had fallen to 0 and rises to its height again.",
    "On real text at this size the gain is a few hundredths of a nat at best: see the text part.",
    "Processor seconds are those of training alone, whatever else the machine does meanwhile.",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for all of it")
    parser.add_argument("--overwrite", action="store_true", help="also into a folder of others")
    parser.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        help="to aim at, with more seeds or, on a busy machine, fewer steps (4)",
    )
    parser.add_argument("--threads", type=int, default=1, help="more rarely help this size (1)")
    parser.add_argument("--seeds", type=int, default=3, help="of the facts, at most (3)")
    parser.add_argument("--facts", type=int, default=8192, help="to learn by heart (8192)")
    unless = "unless --minutes ask for fewer"
    for name, what in WHAT.items():
        told = f"{what} ({USUAL[name]} {unless})"
        parser.add_argument("--" + name.replace("_", "-"), type=int, help=told)
    parser.add_argument("--experts", type=int, default=8, help="per sparse layer (8)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per step (32)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="ids of the tokenizer (1024)")
    parser.add_argument("--seed", type=int, default=0, help="the first (0)")
    parser.add_argument("--text", nargs="+", help="text or JSONL files, instead of Python's own")


def run(arguments: argparse.Namespace) -> int:
    """Run it, and report whichever model wins."""
    import torch

    began = time.monotonic()
    _check(arguments)
    out = _claimed(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        book = _closed_book(arguments, out, began)
        _on_text(arguments, out, book)
    finally:
        torch.set_num_threads(threads)
    print(f"\nAll of it took {duration(time.monotonic() - began)}.")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from moezoo.errors import ConfigError

    least = {"vocabulary": 200, "minutes": 0}
    for name in ("threads", "seeds", "facts", "steps", "text_steps", "further", "experts",
                 "batch_size", *least):  # fmt: skip
        value, low = getattr(arguments, name), least.get(name, 1)
        if value is not None and value < low:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is at least {low}", field=name, found=value)


def _claimed(arguments: argparse.Namespace) -> Path:
    """The output folder: new, empty, or of an earlier demo. Raises TargetExists for any other."""
    from moezoo.errors import TargetExists

    out: Path = arguments.out
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        if not arguments.overwrite:
            hint = "Choose another --out, or pass --overwrite to replace the demo's names in it."
            raise TargetExists("the folder holds files that no demo made", path=out, hint=hint)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("Made by `moezoo demo`, which may replace what it wrote here.\n")
    return out


def _closed_book(arguments: argparse.Namespace, out: Path, began: float) -> Book:
    """Facts by heart: a dense T5, the Switch made from it, and both trained on, seed by seed."""
    from moezoo.demonstration.closed_book import Book
    from moezoo.demonstration.effort import Pace, effort
    from moezoo.reporting.trial import HEADER

    _say(1, f"A closed book: {arguments.facts:,} random facts, which only weights can store")
    print("  A name of three symbols and a relation -> one of 64 values. Nothing can be inferred,")
    print("  so recall shows how much a model stores: the task that rewards parameters most.")
    print("  A mixture of experts has more weights for the same work a token, and has to hold all")
    print("  of them in memory.")
    book = Book(arguments.facts, arguments.experts)
    pace, asked = Pace(*book.rehearsed()), {name: getattr(arguments, name) for name in USUAL}
    gone = time.monotonic() - began
    fitting = effort(asked, pace, 60 * arguments.minutes - gone)
    seeds = fitting.seeds(pace, 60 * arguments.minutes - gone, arguments.seeds)
    book.steps, arguments.text_steps, arguments.further = (
        fitting.steps, fitting.text_steps, fitting.further
    )  # fmt: skip
    each = fitting.seed(pace)
    if fitting.share < 1:
        print(f"  This machine is slow or busy: {fitting.share:.0%} of the usual steps.")
    print(f"  Here, now: {book.steps:,} steps a training, about {duration(each)} a seed; "
          f"{_count(seeds, 'seed')} and the text after it\n  take about "
          f"{duration(gone + seeds * each + fitting.rest(pace))} of the clock "
          f"(--minutes {arguments.minutes:g}, --seeds, --steps).")  # fmt: skip
    for seed in range(arguments.seed, arguments.seed + seeds):
        for label, train in book.trainings(seed):
            with _bar(f"{label} {seed}", book.steps) as step:
                learner = train(step)
            print(
                f"  seed {seed}  {label:<7} recall {learner.curve[0].recall:.3f} -> "
                f"{learner.recall:.3f} in {learner.curve[-1].seconds:.0f} processor seconds"
            )
    print("\n" + table(HEADER, book.table()) + "\n\n" + book.verdict(), flush=True)
    return book


def _on_text(arguments: argparse.Namespace, out: Path, book: Book) -> None:
    """Text, by the command line; then the page of both parts."""
    import moezoo
    from moezoo.demonstration.routing import keep_run, routing_page
    from moezoo.demonstration.text import trial

    material = _material(arguments, out)
    history = _dense(arguments, out, material)
    commands = [  # the sample spreads the routers' first choices over the experts
        _command("upcycle", out / "dense", out / "switch", "--experts", arguments.experts,
                 "--router-init", "mean_orthogonal", "--calibration", out / "sample.txt",
                 "--overwrite"),
        _command("verify", out / "switch", "--against", out / "dense"),
    ]  # fmt: skip
    _say(5, "Load both, and compare them on held-out text")
    models = {"dense": moezoo.load(out / "dense"), "switch": moezoo.load(out / "switch")}
    _compare({name: material.loss(model) for name, model in models.items()})
    _say(6, f"Train both on for {arguments.further:,} steps on the same batches")
    trials: list[Trial] = []
    records: list[StepRecord] = []
    for name, model in models.items():
        records = []  # those of the Switch model in the end
        with _bar(name, arguments.further, records) as step:
            trials.append(
                trial(name, model, material, steps=arguments.further, skip=arguments.text_steps,
                      on_step=step)
            )  # fmt: skip
    _report(out, book, history, trials[0], trials[1], commands)
    run = keep_run(out / "run", models["switch"], material, records, trials[1])
    page = routing_page(out / "routing.html", models["switch"], out / "dense", material, run)
    print(f"Page {page}: what every expert does, token by token")


def _material(arguments: argparse.Namespace, out: Path) -> Material:
    from moezoo.demonstration.text import prepare
    from moezoo.training.corpus import file_documents, python_documents

    source = "your files" if arguments.text else "the documentation that ships with Python"
    _say(2, f"Text: {source}")
    documents = file_documents(arguments.text) if arguments.text else python_documents()
    material = prepare(
        documents,
        out / "spiece.model",
        vocab_size=arguments.vocabulary,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    (out / "sample.txt").write_text(material.sample, encoding="utf-8")
    size = sum(len(document.text) for document in documents)
    print(f"  {size / 1e6:.2f} MB in {len(documents):,} documents, a tenth of them held out")
    print(f"  {material.num_tokens:,} tokens in a vocabulary of {material.tokenizer.vocab_size:,}")
    return material


def _dense(arguments: argparse.Namespace, out: Path, material: Material) -> Curve:
    """Train the dense model and save it; returns its held-out losses."""
    import moezoo
    from moezoo.demonstration.text import small_t5, train

    _say(3, f"Train a dense T5 on span corruption for {arguments.text_steps:,} steps")
    model = moezoo.build(small_t5(arguments.vocabulary), seed=arguments.seed)
    with _bar("dense", arguments.text_steps) as step:
        _, history, _ = train(model, material, steps=arguments.text_steps, on_step=step)
    moezoo.save(model, out / "dense", overwrite=True)
    (out / "spiece.model").rename(out / "dense" / "spiece.model")
    print(f"  held-out loss {history[0][1]:.3f} -> {history[-1][1]:.3f} nats; in {out / 'dense'}")
    return history


def _command(*words: object) -> str:
    """Run a verb as a user would, and show it; returns the line."""
    import torch

    from moezoo.errors import MoezooError

    line = [str(word) for word in words]
    shown = shlex.join(["moezoo", *line])
    if words[0] == "upcycle":
        _say(4, "Upcycle and verify, from the command line")
    print(f"  $ {shown}", flush=True)
    # Threads that spin while they wait would take the time that other programs leave.
    quiet = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", "moezoo", *line],
        text=True,
        capture_output=True,
        env={**os.environ, **quiet},
    )
    for said in (done.stdout + done.stderr).splitlines():
        print(f"    {said}")
    if done.returncode:
        raise MoezooError(f"`{shown}` failed with exit code {done.returncode}")
    return shown


def _compare(losses: dict[str, float]) -> None:
    from moezoo.errors import MoezooError

    gap = abs(losses["dense"] - losses["switch"])
    print(f"  dense {losses['dense']:.6f}   switch {losses['switch']:.6f}   apart {gap:.1e} nats")
    if gap > TOLERANCE:
        raise MoezooError("upcycling changed the model", expected=f"<= {TOLERANCE}", found=gap)


def _report(
    out: Path, book: Book, history: Curve, dense: Trial, switch: Trial, commands: list[str]
) -> None:
    from importlib.util import find_spec

    from moezoo.errors import how_to_install
    from moezoo.reporting.page import html_table, write_page
    from moezoo.reporting.trial import HEADER, balance, rows, verdict

    facts, said = rows(dense, switch), f"{verdict(dense, switch)} {ORDER} {balance(switch)}"
    print("\n" + table(HEADER, facts) + "\n\n" + said + "\n")
    results = {"closed_book": book.to_dict(), "history": history, "dense": dense.to_dict(),
               "switch": switch.to_dict()}  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture = None
    if find_spec("matplotlib") is None:
        print(f"No picture without matplotlib. {how_to_install('report')}")
    else:
        from moezoo.reporting.picture import draw

        picture = draw(book.dense, book.switch, book.price(), dense, switch, path=out / "demo.png")
    text = ["<h2>On text</h2>", f"<p>{escape(said)}</p>",
            html_table(HEADER, facts)]  # fmt: skip
    page = write_page(
        out / "demo.html", title="What experts are for: a dense T5 and the Switch made from it",
        lead=book.verdict(), notes=NOTES, header=HEADER, rows=book.table(), sections=text,
        commands=commands, picture=picture,
    )  # fmt: skip
    print(f"Page {page}" + (f", picture {picture}" if picture else ""))


@contextmanager
def _bar(label: str, steps: int, records: list[StepRecord] | None = None) -> Iterator[OnStep]:
    """A progress bar over training steps that shows the loss; `records` collects them."""
    with Progress(steps, label) as progress:

        def show(record: StepRecord) -> None:
            progress.advance(note=f"loss {record.loss:.3f}")
            if records is not None:
                records.append(record)

        yield show


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _say(number: int, text: str) -> None:
    print(f"\n{number}. {text}", flush=True)
