"""`moezoo generate`: text from a checkpoint, for arguments, a file, a pipe or a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from moezoo.cli.samples import add_tokenizer_argument, named_tokenizer


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="a directory with weights, config.json and a tokenizer")
    parser.add_argument("text", nargs="*", help="source texts; none: lines of standard input")
    add_tokenizer_argument(parser)
    parser.add_argument("--file", help="text file, a source per line; or JSONL, CSV, TSV")
    parser.add_argument("--text-field", default="text", help="field of JSONL, CSV, TSV (text)")
    parser.add_argument("--prefix", default="", help='put before every source ("summarize: ")')
    parser.add_argument("--max-new-tokens", type=int, default=64, help="at most (64)")
    parser.add_argument("--num-beams", type=int, default=1, help="1: greedy (default)")
    parser.add_argument("--sample", action="store_true", help="draw tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --sample (1.0)")
    parser.add_argument("--top-k", type=int, default=0, help="with --sample; 0: all (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="with --sample; 1.0: all (default)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sources at a time (8)")
    parser.add_argument("--device", default="cpu", help="such as cuda (cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument(
        "--keep-special", action="store_true", help="show sentinels, eos and padding"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one line of text per source."""
    import torch

    from moezoo.adapters.checkpoint import load
    from moezoo.errors import ConfigError

    if arguments.batch_size < 1:
        raise ConfigError("--batch-size is at least 1", field="batch_size")
    if arguments.file and arguments.text:
        raise ConfigError("pass texts or --file, not both", field="file")
    model: Any = load(arguments.checkpoint, task="conditional_generation", device=arguments.device)
    tokenizer = named_tokenizer(arguments.tokenizer, arguments.checkpoint, model.config)
    torch.manual_seed(arguments.seed)
    for texts in _batches(_sources(arguments), arguments.batch_size):
        batch = tokenizer.batch([arguments.prefix + text for text in texts])
        ids = model.generate(
            batch.input_ids.to(arguments.device),
            batch.attention_mask.to(arguments.device),
            max_new_tokens=arguments.max_new_tokens,
            num_beams=arguments.num_beams,
            do_sample=arguments.sample,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
        )
        for row in ids[:, 1:]:
            text = tokenizer.decode(row, skip_special=not arguments.keep_special)
            print(text.replace("\n", " "), flush=True)
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
    print("One source per line; Ctrl-D ends.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def _batches(sources: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of at most `size`; one by one where a person waits for each answer."""
    waiting: list[str] = []
    size = 1 if sys.stdin.isatty() else size
    for source in sources:
        waiting.append(source)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
