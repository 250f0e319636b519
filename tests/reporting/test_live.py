"""A run that is watched: for its reader alone, up to date, and the same run."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import moezoo
from moezoo import cli
from moezoo.reporting import live as live_module
from moezoo.reporting.live import Live, served
from tests.reporting.browser import Browser
from tests.reporting.known import word

CONFIG = moezoo.SwitchConfig(
    vocab_size=90, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=4,
    router={"name": "switch", "jitter": 0.1}, dropout_rate=0.1,
)  # fmt: skip
IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS[:, :5]}


def answer(address: str, path: str, **headers: str) -> tuple[int, bytes]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        found = connection.getresponse()
        return found.status, found.read()
    finally:
        connection.close()


def test_only_who_has_the_token_and_asks_this_host_is_answered(tmp_path: Path) -> None:
    with served(Live(tmp_path)) as address:
        query = f"?{urlsplit(address).query}"
        assert urlsplit(address).hostname == "127.0.0.1"
        assert answer(address, f"/{query}")[0] == 200
        assert answer(address, f"/data.json{query}")[0] == 200
        assert answer(address, f"/other{query}")[0] == 404
        for path in ("/", "/data.json", "/?token=", f"/{query}x", "/?token=%ff"):
            assert answer(address, path)[0] == 403
        assert answer(address, f"/{query}", Host="evil.example")[0] == 403
    with pytest.raises(OSError):
        answer(address, f"/{query}")


def test_two_runs_have_different_tokens(tmp_path: Path) -> None:
    with served(Live(tmp_path)) as one, served(Live(tmp_path)) as other:
        assert urlsplit(one).query != urlsplit(other).query


def test_nothing_is_looked_at_while_no_page_is_open_and_not_more_than_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(live_module.time, "monotonic", lambda: now[0])
    calls: list[float] = []
    model = moezoo.build(CONFIG, seed=0).train()

    def slow(*_: object) -> None:
        calls.append(now[0])
        now[0] += 0.25  # what a look costs

    model.encoder.register_forward_pre_hook(slow)
    live = Live(tmp_path, model=model, batch=BATCH)
    live.after_step()
    assert calls == []
    live.data()
    live.after_step()
    live.after_step()
    assert len(calls) == 1 and model.training
    now[0] += 4.5
    live.after_step()
    assert len(calls) == 1  # twenty times a quarter of a second are not over
    now[0] += 1.0
    live.after_step()
    assert len(calls) == 1  # over, but the page has not asked for five seconds
    live.data()
    live.after_step()
    assert len(calls) == 2


def test_a_watched_run_is_the_same_run_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "SECOND", 0.0)
    monkeypatch.setattr(live_module, "_SHARE", 0)
    (tmp_path / "text.txt").write_text("The router sends every token to one expert.\n\n" * 60)
    CONFIG.replace(vocab_size=384).to_json()
    (tmp_path / "config.json").write_text(CONFIG.replace(vocab_size=384).to_json())
    found, looked = {}, []
    original = Live.after_step

    def asked(live: Live) -> None:  # a page that asks after every step
        live.data()
        original(live)
        looked.append(len(json.loads(live.data())["layers"]))

    monkeypatch.setattr(Live, "after_step", asked)
    for name, flags in (("plain", []), ("watched", ["--watch"])):
        words = ["train", str(tmp_path / name), "--config", str(tmp_path / "config.json"), *flags]
        words += ["--text", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--recipe", "small"]
        words += "--steps 6 --batch-size 2 --input-length 24 --dropout 0.1".split()
        assert cli.main(words) == 0
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        kept = [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in rows]
        found[name] = (kept, (tmp_path / name / "model/model.safetensors").read_bytes())
    assert looked == [2] * 6
    assert found["plain"] == found["watched"]
    assert "watch this run at http://127.0.0.1:" in capsys.readouterr().err


def test_a_page_follows_a_run_and_says_when_it_ended(browser: Browser, tmp_path: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    model = moezoo.build(CONFIG, seed=0)
    live = Live(tmp_path, model=model, batch=BATCH, tokenizer=Words())
    metrics = tmp_path / "metrics.jsonl"

    def until(selector: str, text: str) -> None:
        wait = WebDriverWait(browser.driver, 30, poll_frequency=0.05)
        wait.until(lambda _: any(text in found for found in browser.texts(selector)))

    with served(live) as address:
        browser.open(address)
        assert browser.complaints() == []
        assert browser.texts(".panel h2") == ["In training"]
        metrics.write_text('{"step": 1, "loss": 2.5, "dead": 1, "dead_by_layer": {"1": 1}}\n')
        until("#live", "step 1")
        until(".chart text", "2.5")
        live.after_step()  # the page has asked, so its routing is looked at
        until(".panel h2", "The text, token by token")
        assert len(browser.texts(".token")) == IDS.numel()
        browser.do("document.querySelectorAll('.token')[3].focus()")
        with metrics.open("a") as file:
            file.write('{"step": 2, "loss": 1.25}\n')
        until("#live", "step 2")
        until(".chart text", "1.25")
        assert browser.run("return document.activeElement.place") == 3
        assert {urlsplit(url).netloc for url in browser.requests()} == {urlsplit(address).netloc}
        assert browser.complaints() == []
    until("#live", "the run has ended")


class Words:
    def piece(self, number: int) -> str:
        return word(number)
