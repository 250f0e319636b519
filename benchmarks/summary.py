"""What was to be reached on two CPU cores, and what was: from the samples beside this file.

    python -m benchmarks.summary

Writes the table in benchmarks/README.md between its two marks, and benchmarks/layer.png (with the
extra `report`). `goals` needs nothing but the JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.tables import over_best, table

HERE = Path(__file__).parent
BEGIN, END = "<!-- goals: python -m benchmarks.summary -->", "<!-- end of goals -->"
HEAD = ("what, ratios of medians", "goal", "measured", "reached", "more")
Row = tuple[str, str, str, bool | None, str]


def main() -> None:
    page = HERE / "README.md"
    page.write_text(with_goals(page.read_text(), goals(HERE)))
    print(page)
    try:
        from benchmarks.picture import draw
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")
        return
    draw(json.loads((HERE / "layer.json").read_text()), HERE / "layer.png")
    print(HERE / "layer.png")


def with_goals(text: str, rows: Sequence[Row]) -> str:
    """The page with its table of goals replaced."""
    before, _, rest = text.partition(BEGIN)
    words = {True: "yes", False: "no", None: ""}
    cells = [[what, goal, found, words[ok], more] for what, goal, found, ok, more in rows]
    return f"{before}{BEGIN}\n\n{table(HEAD, cells)}\n\n{END}{rest.partition(END)[2]}"


def goals(folder: Path) -> list[Row]:
    """A row per goal whose benchmark has been run."""
    parts: dict[str, Callable[[Any], list[Row]]] = {
        "layer": _layer,
        "router": _router,
        "decode": _decode,
        "int8": _int8,
        "model": _model,
        "load": _load,
        "conversion": _conversion,
        "experts_interface": _experts_interface,
        "sparse_generation": _sparse_generation,
    }
    rows: list[Row] = []
    for name, found in parts.items():
        file = folder / f"{name}.json"
        if file.is_file():
            rows += found(json.loads(file.read_text()))
    return rows


def over(samples: dict[str, list[float]], side: str, base: str) -> float:
    """How many times longer `side` takes than `base`."""
    return median(samples[side]) / median(samples[base])


def _least(values: Sequence[float], goal: float) -> tuple[str, bool]:
    low, high = min(values), max(values)
    return (f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"), low >= goal


def _most(values: Sequence[float], goal: float) -> tuple[str, bool]:
    low, high = min(values), max(values)
    return (f"{high:.2f}" if low == high else f"{low:.2f} to {high:.2f}"), high <= goal


def _layer(record: Any) -> list[Row]:
    more = "[layer](layer.md)"

    def peer(mode: str, experts: set[int], tokens: set[int]) -> list[float]:
        return [over(r["s"], "transformers", "moezoo") for r in chosen(mode, experts, tokens)]

    def chosen(mode: str, experts: set[int], tokens: set[int]) -> list[Any]:
        return [
            r
            for r in record["rows"]
            if r["mode"] == mode
            and (not experts or r["experts"] in experts)
            and (not tokens or r["tokens"] in tokens)
        ]

    rows: list[Row] = []
    for what, goal, values in (
        ("layer forward over transformers, every size", 1.0, peer("forward", set(), set())),
        ("layer forward, one token", 1.5, peer("forward", set(), {1})),
        ("layer forward, 32 experts, 512 tokens", 1.4, peer("forward", {32}, {512})),
        ("layer forward, 128 experts, 512-2,048", 1.3, peer("forward", {128}, {512, 2048})),
        ("layer forward + backward, every size", 0.97, peer("training", set(), set())),
        ("layer forward + backward, 32 experts", 1.1, peer("training", {32}, set())),
        ("layer forward + backward, 128 experts", 1.2, peer("training", {128}, set())),
    ):
        rows.append((what, f">= {goal}", *_least(values, goal), more))
    large = [r for r in record["rows"] if r["tokens"] >= 512]
    own = [over(r["s"], "moezoo", "products") for r in large]
    rows.append(("layer over its own products, 512 tokens on", "<= 1.1", *_most(own, 1.1), more))
    for share, goal in ((1000, 1.05), (256, 1.25)):
        full = [
            over(r["s"], "moezoo", "dense")
            for r in chosen("forward", set(), set())
            if r["tokens"] >= share * r["experts"]
        ]
        what = f"layer over a dense network, {share:,} tokens per expert on"
        rows.append((what, f"<= {goal}", *_most(full, goal), more))
    return rows


def _experts_interface(record: Any) -> list[Row]:
    more = "[experts_interface](experts_interface.md)"
    rows: list[Row] = []
    for mode in ("forward", "training"):
        ratios = [over_best(r["s"]) for r in record["rows"] if r["mode"] == mode]
        what = f"experts of Qwen3-MoE over transformers' best, {mode}, every size"
        rows.append((what, ">= 1.0", *_least(ratios, 1.0), more))
    return rows


def _sparse_generation(record: Any) -> list[Row]:
    more = "[sparse_generation](sparse_generation.md)"
    ratios = [over_best(r["s"]) for r in record["rows"] if r["dtype"] == "float32"]
    what = "generation by a Qwen3-MoE over transformers' best"
    return [(what, ">= 1.0", *_least(ratios, 1.0), more)]


def _router(record: Any) -> list[Row]:
    more = "[router](router.md)"
    rows: list[Row] = []
    (row,) = [r for r in record["rows"] if r["experts"] == 2048 and r["mode"] == "forward"]
    times, memory = row["s"], row["mib"]
    best = [over(times, "transformers", "routing")]
    rows.append(
        (
            "routing over transformers, 2,048 experts, 8,192 tokens",
            ">= 3.5",
            *_least(best, 3.5),
            more,
        )
    )
    floor = over(times, "transformers", "scores")
    rows.append(("the same, with nothing but the scores of torch", "", f"{floor:.2f}", None, more))
    if "switch, given the scores" in times:
        rows += _apart_from_scores(record)
    added = memory["streamed"]
    rows.append(("extra memory of streamed routing, MiB", "<= 8", f"{added:.0f}", added <= 8, more))
    return rows


def _apart_from_scores(record: Any) -> list[Row]:
    rows: list[Row] = []
    for name in ("switch", "top_k"):
        few, many = (
            median(r["s"][f"{name}, given the scores"]) * 1e3
            for r in record["rows"]
            if r["mode"] == "forward" and r["experts"] in (8, 2048)
        )
        what = f"`{name}` with `first_come` apart from scores, ms: 2,048 experts over 8"
        found = f"{many:.2f} over {few:.2f}"
        rows.append((what, "<= 1.5x", found, many <= 1.5 * few, "[router](router.md)"))
    return rows


def _decode(record: Any) -> list[Row]:
    more = "[decode](decode.md)"
    greedy = [r for r in record["rows"] if r["beams"] == 1 and r["batch"] == 1]
    values = [over(r["s"], "transformers", "moezoo") for r in greedy]
    rest = [over(r["s"], "transformers", "moezoo") for r in record["rows"] if r not in greedy]
    same = all(r["equal"] for r in record["rows"])
    return [
        ("greedy decoding, batch 1", ">= 1.5", *_least(values, 1.5), more),
        ("greedy of larger batches, beam search", ">= 1.0", *_least(rest, 1.0), more),
        ("decoding finds the tokens of transformers", "equal", str(same).lower(), same, more),
    ]


def _int8(record: Any) -> list[Row]:
    (row,) = [r for r in record["rows"] if r["what"] == "decoding step, batch 1"]
    value = [over(row["s"], "transformers", "int8")]
    what = "greedy decoding, batch 1, int8 against transformers in float32"
    return [(what, ">= 2.5", *_least(value, 2.5), "[int8](int8.md)")]


def _model(record: Any) -> list[Row]:
    more, rows = "[model](model.md)", []
    for part, goal in (("forward", 1.0), ("training step", 1.5)):
        found = {
            side: [t for r in results for t in r[part]]
            for side, results in record["results"].items()
        }
        value = [over(found, "transformers", "moezoo")]
        rows.append((f"switch-base-8, {part}", f">= {goal}", *_least(value, goal), more))
    for part in ("forward", "training"):
        peaks = {
            side: [r[f"{part} MiB"][0] for r in results]
            for side, results in record["results"].items()
        }
        value = [over(peaks, "moezoo", "transformers")]
        rows.append((f"switch-base-8, peak memory, {part}", "<= 1.0", *_most(value, 1.0), more))
    return rows


def _load(record: Any) -> list[Row]:
    more, rows = "[load](load.md)", []
    for side, part, what in (
        ("unchecked", "load", "loading, neither side reads the weights"),
        ("moezoo", "touch", "loading with its check, all weights read by both"),
    ):
        found = {name: [r[part] for r in runs] for name, runs in record["results"].items()}
        value = [over(found, "transformers", side)]
        rows.append((f"switch-base-8, {what}", ">= 2.0", *_least(value, 2.0), more))
    peak = median(r["mib"] for r in record["results"]["moezoo"])
    value = [peak / (record["bytes"] / 2**20)]
    rows.append(("loading, peak memory over the weights", "<= 1.1", *_most(value, 1.1), more))
    return rows


def _conversion(record: Any) -> list[Row]:
    more = "[conversion](conversion.md)"
    rows: list[Row] = []
    for base, what in (
        ("cp, synced", "upcycling over cp of the output, both on the disk"),
        ("cp", "upcycling over cp that leaves the output in memory"),
    ):
        ratios = [
            over({side: [c["seconds"] for c in of] for side, of in costs.items()}, "moezoo", base)
            for costs in record["models"].values()
        ]
        rows.append((what, "<= 1.25", *_most(ratios, 1.25), more))
    peak = max(c["peak_mib"] for costs in record["models"].values() for c in costs["moezoo"])
    rows.append(("upcycling, peak memory, MiB", "<= 64", f"{peak:.0f}", peak <= 64, more))
    slowest = max(median(c["seconds"] for c in costs) for costs in record["plans"].values())
    rows.append(
        ("plan, T5-small to T5-11B, seconds", "<= 1.0", f"{slowest:.2f}", slowest <= 1.0, more)
    )
    return rows


if __name__ == "__main__":
    main()
