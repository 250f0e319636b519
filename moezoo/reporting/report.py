"""A report: what experts do on a text, in training and beside another model, as one document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from moezoo import __version__
from moezoo.adapters.writer import replacing_file, typed_errors
from moezoo.errors import ConfigError
from moezoo.reporting.advice import advice
from moezoo.reporting.layers import flow, layer_document, top_tokens
from moezoo.reporting.observation import Batch, Observation, observe
from moezoo.reporting.packing import packed
from moezoo.reporting.page_of_report import page_of
from moezoo.reporting.pairs import Pairs, pairs_of
from moezoo.reporting.replays import FACTORS, replayed
from moezoo.reporting.run_metrics import run_document
from moezoo.reporting.streams import labels_of, streams_of
from moezoo.reporting.two_models import Comparison
from moezoo.traces import Trace

FORMAT, VERSION = "moezoo.report", 1
TOKENS = 2000
Document = dict[str, Any]


class Vocabulary(Protocol):
    """What tells the piece of an id: every tokenizer of this package."""

    def piece(self, number: int) -> str: ...


@dataclass(frozen=True)
class Report:
    """A report; in a notebook it shows itself.

    Fields: document, JSON values as docs/report_format.md describes them.
    """

    document: Document

    def html(self) -> str:
        """The page: one file, which asks nothing of any network."""
        return page_of(self.document)

    def json(self) -> str:
        """The document as one line of JSON."""
        return json.dumps(self.document, ensure_ascii=True, separators=(",", ":"))

    def save(self, path: str | Path) -> Path:
        """Write the page, or, for a name that ends in .json, the document; whole or not at all.

        Raises SaveError.
        """
        target = Path(path)
        text = self.json() + "\n" if target.suffix == ".json" else self.html()
        with typed_errors(target), replacing_file(target, overwrite=True) as stage:
            stage.write_text(text, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        # A frame of its own: neither the notebook's style nor the page's reaches the other.
        frame = 'style="width:100%;height:860px;border:0" sandbox="allow-scripts"'
        title = escape(str(self.document["title"]))
        return f'<iframe {frame} title="{title}" srcdoc="{escape(self.html())}"></iframe>'


def report(
    model: nn.Module | Trace | Observation | None,
    batches: Iterable[Batch] = (),
    *,
    tokenizer: Vocabulary | Callable[[int], str] | None = None,
    run: str | Path | None = None,
    against: nn.Module | None = None,
    against_name: str = "the other model",
    title: str = "Routing",
    tokens: int = TOKENS,
) -> Report:
    """Report what the experts of a model do.

    Args:
        model: a model with sparse layers, a dense one of this package (each MLP one expert), a
            trace, or an observation (a trace with its tokens' ids); None: the run alone.
        batches: keyword arguments of the model; not for traces.
        tokenizer: tells the words of ids, by its `piece` or as a function; None: ids.
        run: a run directory or its metrics.jsonl.
        against: another model, run on the same batches: the dense parent, or the same layers
            trained otherwise; against_name: what the page calls it.
        title: heads the page. tokens: of each text that the page shows; numbers are of all.

    Raises ConfigError for a model without anything to report on and for arguments that do not go
    together, RoutingError when no layer ran.
    """
    if tokens < 1:
        raise ConfigError("a report shows at least one token", field="tokens", found=tokens)
    document = empty(title) | {"run": None if run is None else run_document(run)}
    if model is None:
        if run is None or against is not None:
            raise ConfigError("there is nothing to report on", field="model", hint="Pass a model.")
        return Report(document)
    if isinstance(model, Trace):
        model = Observation(model)
    if isinstance(model, Observation):
        if against is not None:
            raise ConfigError("a trace has no weights to compare", field="against")
        return Report(document | _routing(model, tokenizer, tokens))
    comparison = None if against is None else Comparison(model, against, name=against_name)
    seen = observe(model, batches, on_output=None if comparison is None else comparison.keep)
    pair = None if comparison is None else comparison.document(seen)
    return Report(document | _routing(seen, tokenizer, tokens) | {"pair": pair})


def empty(title: str) -> Document:
    """A document without anything to show."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"moezoo {__version__}",
        "title": title,
        "dense": False,
        "notes": [],
        "factors": list(FACTORS),
        "streams": [],
        "layers": [],
        "run": None,
        "pair": None,
    }


@torch.no_grad()
def _routing(
    seen: Observation, tokenizer: Vocabulary | Callable[[int], str] | None, tokens: int
) -> Document:
    """The parts of a report that say what went where."""
    if not any(seen.trace.by_layer.values()):
        raise ConfigError("the trace holds no call", field="model")
    names = list(seen.trace.by_layer)
    labels = dict(zip(names, labels_of(names), strict=True))
    pairs = {name: pairs_of(calls) for name, calls in seen.trace.by_layer.items()}
    streams = streams_of(seen)
    layers: dict[str, Document] = {}
    texts = []
    for number, stream in enumerate(streams):
        shown = min(stream.num_tokens, tokens)
        for name in stream.layers:
            calls = seen.trace.by_layer[name]
            replay = replayed(calls, seen.policies.get(name), tokens=shown)
            layers[name] = layer_document(name, labels[name], calls, pairs[name], shown, replay)
            layers[name]["stream"] = number
        tops = {name: top_tokens(pairs[name], stream.ids) for name in stream.layers}
        listed = torch.cat([ids[ids >= 0] for ids, _ in tops.values()])
        text, vocabulary = stream.document(shown, listed, _piece(tokenizer))
        for name, (id_EM, count_EM) in tops.items():
            row_EM = torch.searchsorted(vocabulary, id_EM.clamp(min=0).contiguous())
            row_EM = torch.where(id_EM < 0, -1, row_EM)
            layers[name]["top"] = {"piece": packed(row_EM, none=True), "count": packed(count_EM)}
        texts.append(text)
        _join(stream.layers, names, layers, pairs)
    ordered = [layers[name] for name in names]
    said = [] if seen.dense else advice(ordered, ours=seen.ours)
    return {"streams": texts, "layers": ordered, "dense": seen.dense, "notes": said}


def _join(
    stream: list[str], names: list[str], layers: dict[str, Document], pairs: dict[str, Pairs]
) -> None:
    """Give every layer of a stream its flow to the next one."""
    for here, there in zip(stream, [*stream[1:], None], strict=True):
        layers[here]["flow"] = (
            None if there is None else {"to": names.index(there), **flow(pairs[here], pairs[there])}
        )


def _piece(tokenizer: Vocabulary | Callable[[int], str] | None) -> Callable[[int], str]:
    if tokenizer is None:
        return lambda number: f" {number}"
    told: Any = tokenizer
    found: Callable[[int], str] = getattr(told, "piece", told)
    return found
