"""A run while it trains: the report's page on this machine alone, with newer data every second."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from torch import nn

from moezoo.errors import MoezooError
from moezoo.reporting.observation import Batch
from moezoo.reporting.page_of_report import page_of
from moezoo.reporting.report import Report, Vocabulary, empty, report
from moezoo.reporting.run_metrics import curves, run_document

SECOND = 1.0
_SHARE = 20  # looking takes at most one part in so many of the time
_GONE = 5.0  # seconds after which a page that asks no more counts as closed
_HOST = "127.0.0.1"


class Live:
    """What a page that watches a run is given.

    Args:
        run: the run directory, whose metrics.jsonl is read when a page asks.
        model, batch: what is routed now: the model, in evaluation and without a gradient, on one
            batch; None: curves alone.
        tokenizer: of the batch's words.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        model: nn.Module | None = None,
        batch: Batch | None = None,
        tokenizer: Vocabulary | None = None,
    ) -> None:
        self.run = Path(run)
        self._model, self._batch, self._tokenizer = model, batch, tokenizer
        self._lock = threading.Lock()
        self._routing = empty("")
        self._data = b""
        self._asked = float("-inf")
        self._next_look = self._next_read = float("-inf")

    def after_step(self) -> None:
        """In the thread that trains: look at the routing, if a page is open and a second is over.

        Nothing of the run changes: no gradient, no random number, no mode.
        """
        began = time.monotonic()
        if self._model is None or self._batch is None:
            return
        if began < self._next_look or began - self._asked > _GONE:
            return
        device = next(self._model.parameters()).device
        batch = {name: value.to(device) for name, value in self._batch.items()}
        with torch.random.fork_rng(), torch.no_grad():
            made = report(self._model, [batch], tokenizer=self._tokenizer)
        with self._lock:
            self._routing = made.document
            self._next_read = float("-inf")
        self._next_look = began + max(SECOND, _SHARE * (time.monotonic() - began))

    def data(self) -> bytes:
        """The newest document as JSON, in the thread of a page."""
        with self._lock:
            now = self._asked = time.monotonic()
            if now >= self._next_read:
                self._data = self.document().json().encode()
                self._next_read = now + max(SECOND / 2, _SHARE * (time.monotonic() - now))
            return self._data

    def document(self) -> Report:
        """The report of the routing that was last looked at and of the run so far."""
        try:
            run = run_document(self.run)
        except MoezooError:  # nothing is written yet
            run = curves([], name=str(self.run))
        title = f"Training {self.run.name}"
        return Report({**self._routing, "title": title, "run": run, "live": True})


@contextmanager
def served(live: Live) -> Iterator[str]:
    """Serve a page on this machine's own address while the block runs; gives where.

    A request must bear the token of the address, and name this server as its host, so that no page
    of another site can read the run through its reader's browser.
    """
    token = secrets.token_urlsafe(24)
    server = ThreadingHTTPServer((_HOST, 0), _handler(live, token))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://{_HOST}:{server.server_port}/?token={token}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(live: Live, token: str) -> type[BaseHTTPRequestHandler]:
    pages: dict[str, tuple[str, Callable[[], bytes]]] = {
        "/": ("text/html", lambda: page_of(json.loads(live.data()), live=True).encode()),
        "/data.json": ("application/json", live.data),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            given = parse_qs(asked.query).get("token", [""])[0]
            known = hmac.compare_digest(given.encode(), token.encode())
            if not known or self.headers.get("Host") != self._own_host():
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"the address lacks its token\n")
            elif asked.path not in pages:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
            else:
                kind, content = pages[asked.path]
                self._answer(HTTPStatus.OK, kind, content())

        def _own_host(self) -> str:
            assert isinstance(self.server, ThreadingHTTPServer)
            return f"{_HOST}:{self.server.server_port}"

        def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(content)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(content)
            except OSError:  # the page was closed meanwhile
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Nothing: the terminal belongs to the run."""

    return Handler
