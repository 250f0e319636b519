"""`moezoo generate`: text from a checkpoint, for arguments, a file, a pipe or a conversation."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from moezoo.cli.samples import add_tokenizer_argument, named_tokenizer
from moezoo.cli.settings import FromFile, as_written
from moezoo.errors import ConfigError
from moezoo.generation_options import OPTIONS, checked


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="a directory with weights, config.json and a tokenizer")
    parser.add_argument("text", nargs="*", help="source texts; none: lines of standard input")
    add_tokenizer_argument(parser)
    parser.add_argument("--file", help="text file, a source per line; or JSONL, CSV, TSV")
    parser.add_argument("--text-field", default="text", help="field of JSONL, CSV, TSV (text)")
    parser.add_argument("--prefix", default="", help='put before every source ("summarize: ")')
    parser.add_argument("--decoder-prompt", help="a text that every answer begins with")
    parser.add_argument("--scores", action="store_true", help="put a score before every text")
    parser.add_argument("--batch-size", type=int, default=8, help="sources at a time (8)")
    parser.add_argument("--device", default="cpu", help="such as cuda (cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument(
        "--keep-special", action="store_true", help="show sentinels, eos and padding"
    )
    parser.add_argument("--settings", action=FromFile, help="TOML or JSON of flags; flags win")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="FIELD",
        help="leave a field of generation_config.json out; may be repeated",
    )
    group = parser.add_argument_group(
        "options of generation",
        "What is not given is what the checkpoint's generation_config.json says, or the default in "
        "brackets. Lists are JSON, such as [5, 6].",
    )
    for name, option in OPTIONS.items():
        _add(group, name, option)


def _add(group: argparse._ArgumentGroup, name: str, option: dataclasses.Field[Any]) -> None:
    """The flag of an option: what it does, what it may be, its default."""
    kind, default = option.metadata["kind"], option.default
    text = option.metadata["text"] + ("" if default is None else f" ({default})".lower())
    flag = f"--{name.replace('_', '-')}"
    text = text.replace("%", "%%")
    if kind.words == "true or false":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(flag, type=as_written, metavar="VALUE", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Print one line of text per generated sequence."""
    import torch

    from moezoo.adapters.checkpoint import load

    if arguments.batch_size < 1:
        raise ConfigError("--batch-size is at least 1", field="batch_size")
    if arguments.file and arguments.text:
        raise ConfigError("pass texts or --file, not both", field="file")
    said = {name: getattr(arguments, name) for name in OPTIONS}
    said = {name: value for name, value in said.items() if value is not None}
    for name, value in said.items():
        checked(name, value)  # before anything is loaded
    options = {**dict.fromkeys(arguments.without), **said}
    model: Any = load(arguments.checkpoint, task="conditional_generation", device=arguments.device)
    tokenizer = named_tokenizer(arguments.tokenizer, arguments.checkpoint, model.config)
    torch.manual_seed(arguments.seed)
    prompt = None
    if arguments.decoder_prompt is not None:
        ids = tokenizer.encode(arguments.decoder_prompt, eos=False)
        prompt = torch.tensor([ids], dtype=torch.int64, device=arguments.device)
    talking = sys.stdin.isatty() and not (arguments.text or arguments.file)
    for texts in _batches(_sources(arguments), 1 if talking else arguments.batch_size):
        batch = tokenizer.batch([arguments.prefix + text for text in texts])
        found = model.generate(
            batch.input_ids.to(arguments.device),
            batch.attention_mask.to(arguments.device),
            decoder_input_ids=None if prompt is None else prompt.expand(len(texts), -1),
            return_scores=arguments.scores,
            **options,
        )
        scores = found.sequences_scores.tolist() if arguments.scores else []
        for index, row in enumerate(found.sequences if arguments.scores else found):
            text = tokenizer.decode(row[1:], skip_special=not arguments.keep_special)
            score = f"{scores[index]:.4f}\t" if scores else ""
            print(score + text.replace("\n", " "), flush=True)
    return 0


def _sources(arguments: argparse.Namespace) -> Iterator[str]:
    from moezoo.text_files import lines, texts

    if arguments.text:
        yield from arguments.text
        return
    if arguments.file:
        yield from (text for _, text in texts(arguments.file, field=arguments.text_field))
        return
    if not sys.stdin.isatty():
        yield from (text for _, text in lines(sys.stdin.buffer))
        return
    yield from _conversation()


def _conversation() -> Iterator[str]:
    """What a person types, with line editing and the lines before where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import is what gives `input` its keys

    print("One source per line; Ctrl-D ends.", file=sys.stderr)
    while True:
        if not sys.stdout.isatty():  # `input` would write its prompt into what is piped on
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return


def _batches(sources: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of at most `size`."""
    waiting: list[str] = []
    for source in sources:
        waiting.append(source)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
