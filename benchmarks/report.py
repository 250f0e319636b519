"""The report's page: how large it is, how long it takes to make, and to open in Chromium.

    python -m benchmarks.report [--rounds 9] [--picture PAGE OUT.png]

"make" is the processor's time from a trace to the file; "open" is the time from the start of
navigation until the page has drawn itself, after which every control works; "processor" is what the
page's process took for it, which other work on the machine does not lengthen. Each round opens
every page in turn in one headless browser. Writes benchmarks/report.json and report.md. `--picture`
takes a picture of the top of a page instead.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.tables import machine, milliseconds, save, table
from moezoo.functional.assign import token_choice
from moezoo.records import Routing, Tokens
from moezoo.reporting.observation import Observation
from moezoo.reporting.report import report
from moezoo.traces import Trace

SIZES = {  # tokens, layers, experts, choices
    "a Switch of two layers": (2000, 2, 8, 1),
    "24 layers of 8, two choices": (2000, 24, 8, 2),
    "24 layers of 128": (2000, 24, 128, 1),
    "24 layers of 128, two choices": (2000, 24, 128, 2),
}
GOAL = "24 layers of 128"  # under 1 MB and 1 s


def routed(tokens: int, layers: int, experts: int, choices: int) -> Observation:
    """Random routing of one text of random ids through so many layers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8000, (tokens,), generator=generator)
    calls = {}
    for layer in range(layers):
        probs = (2 * torch.randn(tokens, experts, generator=generator)).softmax(1)
        pairs = token_choice(probs, probs, choices, Tokens(torch.zeros(tokens, 1)))
        routing = Routing(pairs, probs=probs, proposed=pairs, sequence_length=500)
        calls[f"decoder.layers.{layer}.mlp"] = (routing,)
    return Observation(Trace(calls), dict.fromkeys(calls, (ids,)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--picture", nargs=2, type=Path, metavar=("PAGE", "OUT"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    browser = started()
    try:
        if options.picture:
            photograph(browser, *options.picture)
            return
        results = measured(browser, options.rounds)
    finally:
        browser.quit()
    record = {"machine": machine(), "results": results}
    save(options.out, record, page(record))


def started() -> Any:
    """A headless Chromium with its driver, where `make browser` has put them."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def measured(browser: Any, rounds: int) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            seen = routed(*size)
            began = time.process_time()
            made = report(seen, tokenizer=lambda number: f"\u2581piece{number}")
            target = made.save(Path(folder) / f"{len(results)}.html")
            results[name] = {
                "bytes": target.stat().st_size,
                "make": time.process_time() - began,
                "open": [],
                "processor": [],
                "page": str(target),
            }
        for _ in range(rounds + 1):
            for found in results.values():
                before = processor(browser)
                found["open"].append(opened(browser, Path(found["page"])))
                found["processor"].append(processor(browser) - before)
    for found in results.values():
        del found["page"], found["open"][0], found["processor"][0]  # the first is a warm-up
        print(found, flush=True)
    return results


def opened(browser: Any, page: Path) -> float:
    """Seconds from the start of navigation to the second frame after the page has built itself."""
    browser.get("about:blank")
    browser.get(page.as_uri())
    frame = "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"
    now = browser.execute_async_script(f"const done = arguments[0]; {frame}")
    return float(now) / 1e3


def processor(browser: Any) -> float:
    """Seconds of the processor that the page's process has taken so far, for all its pages."""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(each["value"] for each in found if each["name"] == "ProcessTime"))


def photograph(browser: Any, page: Path, target: Path) -> None:
    """The top of a page at 1280 x 860, in light, with a line of the text chosen."""
    size = {"width": 1280, "height": 860, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(browser, page.resolve())
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    target.write_bytes(base64.b64decode(shot["data"]))


def page(record: dict[str, Any]) -> list[str]:
    """The sections of report.md."""
    rows = [
        [
            name,
            f"{found['bytes'] / 1e3:,.0f}",
            f"{found['make']:.2f}",
            milliseconds(found["open"]),
            milliseconds(found["processor"]),
        ]
        for name, found in record["results"].items()
    ]
    goal = record["results"][GOAL]
    small, quick = goal["bytes"] < 1e6, median(goal["processor"]) < min(goal["open"]) < 1.0
    intro = __doc__.split("\n\n")[-1].strip()
    return [
        "# The report's page",
        f"`python -m benchmarks.report`, {record['machine']}. {intro}",
        f"2,000 tokens each. The goal is under 1 MB and 1 s for {GOAL}: "
        f"{'reached' if small and quick else 'not reached'}, by the fastest time on a machine that "
        "others use. Times: median (min).",
        table(["routing", "size, kB", "make, s", "open, ms", "processor, ms"], rows),
    ]


if __name__ == "__main__":
    main()
