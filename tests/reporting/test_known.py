"""A report of known routing holds what is known, number by number."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo import capacity, traces
from moezoo.reporting.packing import packed, packed_bits, unpacked
from moezoo.reporting.replays import FACTORS
from moezoo.reporting.report import report
from tests.reporting.known import EXPERTS, expert_of, observation, real_ids, share_of, word


@given(st.lists(st.integers(0, 2**32 - 2)))
def test_packed_numbers_come_back(numbers: list[int]) -> None:
    assert unpacked(packed(torch.tensor(numbers, dtype=torch.int64))) == numbers


@given(st.lists(st.integers(-1, 70000), min_size=1))
def test_a_missing_number_is_the_largest_of_its_type(numbers: list[int]) -> None:
    text = packed(torch.tensor(numbers), none=True)
    largest = 2 ** int(text.partition(":")[0][1:]) - 1
    assert unpacked(text) == [largest if n < 0 else n for n in numbers]


@given(st.lists(st.booleans()))
def test_packed_bits_come_back(bits: list[bool]) -> None:
    found = unpacked(packed_bits(torch.tensor(bits, dtype=torch.bool)))
    assert found[: len(bits)] == bits and not any(found[len(bits) :])


def test_tokens_experts_shares_and_loads_are_the_traces() -> None:
    seen = observation()
    ids, document = real_ids(seen), report(seen, tokenizer=word).document
    (stream,) = document["streams"]
    assert [stream["pieces"][row] for row in unpacked(stream["piece"])] == [
        word(i).replace("\u2581", " ") for i in ids
    ]
    assert sum(stream["sequences"]) == stream["tokens"] == len(ids) == 70
    counts = dict(zip(stream["pieces"], unpacked(stream["counts"]), strict=True))
    assert len(counts) <= len(stream["pieces"]) and sum(unpacked(stream["counts"])) == 70
    for number, layer in enumerate(document["layers"]):
        assert layer["label"] == f"encoder {number}"
        assert unpacked(layer["expert"]) == [expert_of(i, number) for i in ids]
        wanted = [round(255 * share_of(i)) for i in ids]
        assert max(abs(a - b) for a, b in zip(unpacked(layer["share"]), wanted, strict=True)) <= 1
        load = Counter(expert_of(i, number) for i in ids)
        assert layer["load"] == [load[e] for e in range(EXPERTS)]
        assert layer["dead"] == [7]


def test_kept_and_ranks_are_what_the_policy_says() -> None:
    seen = observation()
    document = report(seen).document
    for layer in document["layers"]:
        calls = seen.trace.by_layer[layer["name"]]
        kept = torch.cat([c.assignment.kept[c.real] for c in calls]).tolist()
        assert unpacked(layer["kept"])[: len(kept)] == kept and not all(kept)
        ranks = unpacked(layer["capacity"]["rank"])
        for step, factor in enumerate(FACTORS):
            policy = capacity.build({"name": "first_come", "factor": factor})
            alone = traces.Trace({layer["name"]: calls})
            share = traces.dropped(alone, policy)[layer["name"]]
            assert layer["capacity"]["dropped"][step] == round(share * layer["offered"])
            at = [policy(replace(c, assignment=c.offered)).kept[c.real] for c in calls]
            assert [rank <= step for rank in ranks] == torch.cat(at).tolist()


def test_top_tokens_are_those_whose_id_tells_of_the_expert() -> None:
    seen = observation()
    ids, document = real_ids(seen), report(seen, tokenizer=str).document
    (stream,) = document["streams"]
    for number, layer in enumerate(document["layers"]):
        piece, count = unpacked(layer["top"]["piece"]), unpacked(layer["top"]["count"])
        for expert in range(EXPERTS):
            row = range(8 * expert, 8 * expert + 8)
            found = {stream["pieces"][piece[j]]: count[j] for j in row if count[j]}
            wanted = Counter(str(i) for i in ids if expert_of(i, number) == expert)
            assert len(found) == min(len(wanted), 8)
            assert all(wanted[name] == times for name, times in found.items())


def test_flows_count_the_tokens_between_two_layers() -> None:
    seen = observation()
    ids, layers = real_ids(seen), report(seen).document["layers"]
    flow = layers[0]["flow"]
    found = zip(*(unpacked(flow[name]) for name in ("from", "into", "count")), strict=True)
    wanted = Counter((expert_of(i, 0), expert_of(i, 1)) for i in ids)
    assert {(a, b): n for a, b, n in found} == wanted
    assert (flow["to"], flow["total"], layers[-1]["flow"]) == (1, 70, None)


def test_the_excerpt_is_cut_and_the_numbers_are_of_all() -> None:
    full, cut = (report(observation(), tokens=n).document for n in (2000, 21))
    assert cut["streams"][0]["sequences"] == [8, 9, 4] and cut["streams"][0]["tokens"] == 70
    for whole, part in zip(full["layers"], cut["layers"], strict=True):
        assert unpacked(part["expert"]) == unpacked(whole["expert"])[:21]
        assert unpacked(part["capacity"]["rank"]) == unpacked(whole["capacity"]["rank"])[:21]
        for name in ("load", "dropped", "confidence_bins", "flow"):
            assert part[name] == whole[name]


def test_a_trace_alone_has_places_for_words() -> None:
    document = report(observation().trace).document
    assert "piece" not in document["streams"][0]
    assert all(not any(unpacked(layer["top"]["count"])) for layer in document["layers"])
