"""The page in a real browser: it shows what is known to be true, by mouse, keyboard and ear."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from moezoo import capacity, traces
from moezoo.reporting.replays import FACTORS
from moezoo.reporting.report import Report, report
from tests.reporting.browser import Browser, checker
from tests.reporting.known import EXPERTS, LAYERS, expert_of, observation, real_ids, word

SEEN = observation()
IDS = real_ids(SEEN)
ROWS = [
    {"step": s, "loss": 5 / s, "dropped": 0.2 / s, "max_violation": 1.5, "entropy": None,
     "dead": s % 3, "dead_by_layer": {"1": s % 3} if s % 3 else {}}
    for s in range(1, 31)
]  # fmt: skip


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every panel."""
    folder = tmp_path_factory.mktemp("page")
    lines = [
        *ROWS,
        {"step": 30, "held_out": 0.4},
        {"step": 20, "warnings": ["tokens are <dropped>"]},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    made = report(SEEN, tokenizer=word, run=folder, title="Known routing")
    names = list(SEEN.trace.by_layer)
    pair = {
        "name": "another", "dense": False, "error": 1.25e-7, "largest": 3e-6,
        "layers": [
            {"layer": name, "agreement": 0.5 + 0.1 * i, "parent": [0.1 * e for e in range(EXPERTS)],
             "siblings": [0.3] * EXPERTS}
            for i, name in enumerate(names)
        ],
    }  # fmt: skip
    return Report({**made.document, "pair": pair}).save(folder / "page.html")


@pytest.fixture
def page(browser: Browser, whole: Path) -> Browser:
    browser.open(whole)
    return browser


def test_every_token_has_its_word_and_its_expert_in_every_layer(page: Browser) -> None:
    assert page.texts(".token bdi") == [word(i)[1:] for i in IDS]
    for layer in range(LAYERS):
        page.slide("layer", layer)
        assert page.data(".token", "data-expert") == [str(expert_of(i, layer)) for i in IDS]
        classes = page.run("return [...document.querySelectorAll('.token')].map(e => e.className)")
        hues = [name.split()[2] for name in classes]
        assert hues == [f"e{expert_of(i, layer)}" for i in IDS]
        assert all(
            f"expert {expert_of(i, layer)}, " in str(spoken)
            for i, spoken in zip(IDS, page.data(".token", "aria-label"), strict=True)
        )
    assert page.texts("#layer-name") == ["encoder 2"]


def test_what_ran_dropped_is_struck_through(page: Browser) -> None:
    name = next(iter(SEEN.trace.by_layer))
    kept = [k for c in SEEN.trace.by_layer[name] for k in c.assignment.kept[c.real].tolist()]
    assert struck(page) == [not k for k in kept] and not all(kept)


def struck(page: Browser) -> list[bool]:
    script = (
        "return [...document.querySelectorAll('.token')].map(e => e.classList.contains('dropped'))"
    )
    return list(page.run(script))


def test_the_capacity_slider_has_the_numbers_of_a_replay_in_python(page: Browser) -> None:
    for step in (0, 9, 20, 35, len(FACTORS) - 1):
        page.slide("factor", step)
        policy = capacity.build({"name": "first_come", "factor": FACTORS[step]})
        shares = traces.dropped(SEEN.trace, policy).values()
        wanted = [f"{100 * share:.1f} % ({round(share * len(IDS))})" for share in shares]
        assert [text for text in page.texts(".drops text") if "%" in text] == wanted
        assert sum(struck(page)) == round(next(iter(shares)) * len(IDS))
    page.do("document.querySelector('#capacity button').click()")
    assert page.texts("#factor-value") == ["1.25"]
    test_what_ran_dropped_is_struck_through(page)


def test_an_expert_shows_its_tokens_alone(page: Browser) -> None:
    mine = "return [...document.querySelectorAll('.token.mine')].map(e => e.place)"
    page.do("document.querySelector('[data-chip=\"3\"]').click()")
    assert page.run(mine) == [t for t, i in enumerate(IDS) if expert_of(i, 0) == 3]
    assert page.data(".token.mine", "aria-selected") == ["true"] * len(page.run(mine))
    assert "Expert 3 of encoder 0" in page.texts(".cardhead strong")[0]
    lift = len(IDS) / len(page.run(mine))  # all of an id's tokens go to one expert
    assert set(page.texts(".lift")) == {f"{float(f'{lift:.3g}'):g}\u00d7"}
    page.slide("layer", 1)
    assert page.run(mine) == [t for t, i in enumerate(IDS) if expert_of(i, 1) == 3]
    first = str(expert_of(IDS[0], 1))
    page.do("document.querySelector('.token').click()")
    assert page.data(".chip[aria-pressed=true]", "data-chip") == [first]
    page.do("document.querySelector('[data-chip=\"null\"]').click()")
    assert page.run(mine) == []


def test_keys_move_through_text_and_layers(page: Browser) -> None:
    left, right, up, down = "\ue012", "\ue014", "\ue013", "\ue015"
    page.do("document.querySelector('.token').focus()")
    here = "return document.activeElement.place"
    page.press(right, right, left, right)
    assert page.run(here) == 2
    page.press(down, down, down)
    assert page.texts("#layer-name") == ["encoder 2"] and page.run(here) == 2
    assert f"expert {expert_of(IDS[2], 2)}" in page.texts("#said")[0]
    assert not page.run("return document.getElementById('tip').hidden")
    page.press(up, "\ue010")
    assert page.texts("#layer-name") == ["encoder 1"] and page.run(here) == len(IDS) - 1
    page.press("\ue007")
    chosen = str(expert_of(IDS[-1], 1))
    assert page.data(".chip[aria-pressed=true]", "data-chip") == [chosen]
    page.press("\ue00c")
    assert page.data(".chip[aria-pressed=true]", "data-chip") == ["null"]


def test_the_heatmap_says_loads_and_chooses_by_key(page: Browser) -> None:
    page.do("document.querySelector('.heatmap svg').focus()")
    page.press("\ue015", "\ue014", "\ue014")
    load = [sum(expert_of(i, 1) == e for i in IDS) for e in range(EXPERTS)]
    said = page.texts("#said")[0]
    assert said.startswith(f"encoder 1, expert 2: {100 * load[2] / len(IDS):.1f} % of {len(IDS)}")
    page.press("\ue007")
    assert page.texts("#layer-name") == ["encoder 1"]
    assert page.data(".chip[aria-pressed=true]", "data-chip") == ["2"]
    assert (
        page.run("return document.querySelector('path.dead').getAttribute('d').split('M').length")
        == 4
    )


def test_every_picture_has_a_table_behind_it(page: Browser) -> None:
    page.do("document.querySelectorAll('.behind').forEach(d => { d.open = true; })")
    page.settle()
    found = page.run(
        "return [...document.querySelectorAll('.behind')]"
        ".map(d => d.querySelectorAll('tbody tr').length)"
    )
    assert len(found) == len(page.texts(".panel")) == 7 and all(found)
    table = page.run(
        "return [...document.querySelectorAll('#load tbody tr')]"
        ".map(r => [...r.children].map(c => c.textContent))"
    )
    for layer, row in enumerate(table):
        load = [sum(expert_of(i, layer) == e for i in IDS) for e in range(EXPERTS)]
        assert row[4:] == [str(n) for n in load]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen_and_a_checker_finds_nothing_serious(
    browser: Browser, whole: Path, width: int, dark: bool
) -> None:
    browser.open(whole, width=width, dark=dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    browser.do("document.querySelectorAll('.behind').forEach(d => { d.open = true; })")
    browser.do("document.querySelector('[data-chip=\"3\"]').click()")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.serious(checker()) == []


def test_the_page_asks_for_nothing_and_complains_of_nothing(browser: Browser, whole: Path) -> None:
    browser.open(whole)
    browser.do("document.querySelectorAll('button, .token').forEach(e => e.click())")
    browser.slide("factor", 3)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if url != whole.as_uri()] == []


def test_paper_gets_all_of_the_text_and_of_the_buttons_only_the_key_to_the_colours(
    page: Browser,
) -> None:
    page.command("Emulation.setEmulatedMedia", media="print", features=[])
    hidden = page.run(
        "return [...document.querySelectorAll('button:not(.chip), .chip.all')]"
        ".every(e => getComputedStyle(e).display === 'none')"
    )
    assert hidden
    inside = "const t = document.querySelector('.text'); return t.scrollHeight - t.clientHeight"
    assert page.run(inside) <= 1
    pdf = page.command("Page.printToPDF", printBackground=True)
    assert base64.b64decode(pdf["data"]).startswith(b"%PDF")


HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "<!--<script>",
    "&lt;b&gt;",
    "]]>{{program}}{{data}}",
    "x" * 10**6,
    "\u05e9\u05dc\u05d5\u05dd \u202e\u05e2\u05d5\u05dc\u05dd",
    "\U0001f469\u200d\U0001f680",
    "\ud800",
    "\u2028",
]


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    script = HOSTILE[0]
    folder = tmp_path / "run <img src=x onerror='window.hacked = 3'>"
    folder.mkdir()
    row = {"step": 1, "loss": 1.0, "warnings": [script]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    made = report(SEEN, tokenizer=lambda i: HOSTILE[i % len(HOSTILE)], run=folder, title=script)
    made = Report({**made.document, "notes": HOSTILE})
    browser.open(made.save(tmp_path / "page.html"), width=360)
    browser.do("document.querySelectorAll('.behind').forEach(d => { d.open = true; })")
    browser.do("document.querySelectorAll('.token').forEach(e => { e.focus(); e.click(); })")
    assert browser.run("return window.hacked ?? null") is None
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.texts("h1") == [script] == [browser.driver.title]
    assert browser.complaints() == []
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    shown = browser.texts(".token bdi")
    assert len(shown) == len(IDS) and max(map(len, shown)) < 100
    assert shown[[i % len(HOSTILE) for i in IDS].index(0)] == script[:39] + "\u2026"


def test_markup_that_comes_into_the_page_does_not_run(browser: Browser, whole: Path) -> None:
    """The page's policy is a second wall: even markup that somebody put in would do nothing."""
    browser.open(whole)
    browser.do(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')"
    )
    browser.do("const s = document.createElement('script'); s.textContent = 'window.hacked = 2';"
               "document.body.append(s)")  # fmt: skip
    assert browser.run("return window.hacked ?? null") is None
    assert browser.complaints()
