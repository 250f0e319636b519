"""A headless Chromium that opens pages and tells what they asked for and complained about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Browser:
    """One browser for all tests; `open` begins anew."""

    def __init__(self) -> None:
        webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
        found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            pytest.skip(f"no {missing[0]} here: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = found["chromium"]
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(found["chromedriver"])
        self.driver: Any = webdriver.Chrome(options=options, service=service)

    def open(
        self, page: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        """Load a file or an address at a size and in light or dark."""
        self.driver.get("about:blank")
        self.complaints()
        self.requests()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)
        self.settle()

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def settle(self) -> None:
        """Wait until the page has drawn what it was told."""
        frame = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        self.driver.execute_async_script(frame)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def do(self, script: str, *arguments: Any) -> None:
        """Run a script that changes the page, and wait for the page."""
        self.run(script, *arguments)
        self.settle()

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)
        self.settle()

    def slide(self, name: str, value: int) -> None:
        """Move a slider as a hand does."""
        self.do(
            "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('input'))", name, value,
        )  # fmt: skip

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.run(script, selector))

    def data(self, selector: str, name: str) -> list[str | None]:
        found = "[...document.querySelectorAll(arguments[0])]"
        return list(
            self.run(f"return {found}.map(e => e.getAttribute(arguments[1]))", selector, name)
        )

    def complaints(self) -> list[str]:
        """What the console has said since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since it was last asked."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def serious(self, program: str) -> list[str]:
        """What the accessibility checker finds serious or critical in the page."""
        self.run(program)
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(done)"
        )
        return [
            f"{rule['id']}: {node['html'][:200]} {node.get('failureSummary', '')[:200]}"
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]


def checker() -> str:
    """The program of axe-core, which `make browser` fetches; skips the test without it."""
    path = ROOT / "build" / "browser" / "package" / "axe.min.js"
    if not path.is_file():
        pytest.skip("no axe-core here: make browser")
    return path.read_text(encoding="utf-8")
