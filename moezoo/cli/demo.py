"""`moezoo demo`: text, tokenizer, dense T5, Switch, table and picture, in one go."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moezoo.demonstration import Material, OnStep
    from moezoo.report.trial import Curve, Trial

TOLERANCE = 1e-4


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for all of it")
    parser.add_argument("--steps", type=int, default=1000, help="of the dense model alone (1000)")
    parser.add_argument("--further", type=int, default=400, help="of both models after it (400)")
    parser.add_argument("--experts", type=int, default=8, help="per sparse layer (8)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per step (32)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="ids of the tokenizer (2048)")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (0)")
    parser.add_argument("--text", nargs="+", help="text, JSONL, CSV or TSV files, not Python's own")


def run(arguments: argparse.Namespace) -> int:
    """Run it, and report whichever model wins."""
    import moezoo
    from moezoo.demonstration import trial

    began = time.monotonic()
    out = _fresh(arguments)
    material = _material(arguments, out)
    history = _dense(arguments, out, material)
    commands = [  # the sample spreads the routers' first choices over the experts
        _command(
            "upcycle",
            out / "dense",
            out / "switch",
            "--experts",
            arguments.experts,
            "--router-init",
            "mean_orthogonal",
            "--calibration",
            out / "sample.txt",
        ),  # fmt: skip
        _command("verify", out / "switch", "--against", out / "dense"),
    ]
    _say(4, "Load both, and compare them on held-out text")
    models = {"dense": moezoo.load(out / "dense"), "switch": moezoo.load(out / "switch")}
    _compare({name: material.loss(model) for name, model in models.items()})
    _say(5, f"Train both on for {arguments.further:,} steps on the same batches")
    trials = []
    for name, model in models.items():
        with _bar(name, arguments.further) as step:
            trials.append(
                trial(name, model, material, steps=arguments.further, skip=arguments.steps,
                      on_step=step)
            )  # fmt: skip
    _report(out, history, trials[0], trials[1], commands)
    print(f"\nAll of it took {time.monotonic() - began:.0f} s.")
    return 0


def _fresh(arguments: argparse.Namespace) -> Path:
    """The output folder, without what an earlier demo left there."""
    from moezoo.errors import ConfigError

    for name in ("steps", "further", "experts"):
        value = getattr(arguments, name)
        if value < 1:
            raise ConfigError(f"--{name} is at least 1", field=name, found=value)
    if arguments.vocabulary < 200:
        found = arguments.vocabulary
        raise ConfigError("--vocabulary is at least 200", field="vocabulary", found=found)
    out: Path = arguments.out
    for name in ("dense", "switch"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _material(arguments: argparse.Namespace, out: Path) -> Material:
    from moezoo.demonstration import prepare
    from moezoo.training.corpus import file_documents, python_documents

    source = "your files" if arguments.text else "the documentation that ships with Python"
    _say(1, f"Text: {source}")
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
    from moezoo.demonstration import small_t5, train

    _say(2, f"Train a dense T5 on span corruption for {arguments.steps:,} steps")
    model = moezoo.build(small_t5(arguments.vocabulary), seed=arguments.seed)
    with _bar("dense", arguments.steps) as step:
        _, history = train(model, material, steps=arguments.steps, on_step=step)
    moezoo.save(model, out / "dense")
    (out / "spiece.model").rename(out / "dense" / "spiece.model")
    print(f"  held-out loss {history[0][1]:.3f} -> {history[-1][1]:.3f} nats; in {out / 'dense'}")
    return history


def _command(*words: object) -> str:
    """Run a verb as a user would, and show it; returns the line."""
    from moezoo.errors import MoezooError

    line = [str(word) for word in words]
    shown = shlex.join(["moezoo", *line])
    if words[0] == "upcycle":
        _say(3, "Upcycle and verify, from the command line")
    print(f"  $ {shown}", flush=True)
    done = subprocess.run([sys.executable, "-m", "moezoo", *line], text=True, capture_output=True)
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


def _report(out: Path, history: Curve, dense: Trial, switch: Trial, commands: list[str]) -> None:
    from importlib.util import find_spec

    from moezoo.cli.terminal import table
    from moezoo.report.page import write_page
    from moezoo.report.trial import HEADER, rows, verdict

    facts = rows(dense, switch)
    print("\n" + table(HEADER, facts) + "\n\n" + verdict(dense, switch) + "\n")
    results = {"history": history, "dense": dense.to_dict(), "switch": switch.to_dict()}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture = None
    if find_spec("matplotlib") is None:
        print("No picture without matplotlib: pip install 'moezoo[report]'.")
    else:
        from moezoo.report.picture import draw

        picture = draw(history, dense, switch, out / "demo.png")
    title = "A dense T5 and the Switch model made from it"
    page = write_page(
        out / "demo.html", title=title, lead=verdict(dense, switch), header=HEADER, rows=facts,
        commands=commands, picture=picture,
    )  # fmt: skip
    print(f"Page {page}" + (f", picture {picture}" if picture else ""))


@contextmanager
def _bar(label: str, steps: int) -> Iterator[OnStep]:
    """A progress bar over training steps that shows the loss."""
    from moezoo.cli.terminal import Progress

    with Progress(steps, f"  {label:<7}") as progress:
        yield lambda record: progress.advance(note=f"loss {record.loss:.3f}")


def _say(number: int, text: str) -> None:
    print(f"\n{number}. {text}", flush=True)
