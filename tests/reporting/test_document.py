"""The document of a report holds what the trace holds, number by number."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moezoo
from moezoo import capacity, traces
from moezoo.reporting.observation import Observation, observe
from moezoo.reporting.packing import unpacked
from moezoo.reporting.pieces import LONGEST, readable
from moezoo.reporting.replays import FACTORS
from moezoo.reporting.report import report
from tests.reporting.known import observation

CONFIG = moezoo.SwitchConfig(
    vocab_size=400, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=4
)


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 384, (count, 2, 9), generator=generator)
    return [{"input_ids": row, "labels": row[:, :4]} for row in ids]


POLICIES = [
    {"name": "first_come", "rule": "mesh"},
    {"name": "first_come", "limit": 3},
    {"name": "random_order", "seed": 3},
    "batch_priority",
    "switch",
    "dropless",
    "transformers",
    "reroute",
]


@pytest.mark.parametrize("spec", POLICIES, ids=str)
def test_the_layers_own_policy_is_replayed(spec: str | dict[str, object]) -> None:
    model = moezoo.build(CONFIG, seed=0, capacity=spec, decoder_sparse_layers=())
    ids = torch.randint(2, 384, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    seen = observe(model, [{"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}])
    (layer,) = report(seen).document["layers"]
    own = model.get_submodule(layer["name"]).capacity
    class_name = "SwitchCapacity" if spec == "dropless" else type(own).__name__
    assert layer["capacity"]["policy"] == class_name
    drops = layer["capacity"]["dropped"]
    assert drops == sorted(drops, reverse=True) and drops[-1] == 0 < drops[0]
    for step in (0, 7, 20):
        share = traces.dropped(seen.trace, own.with_factor(FACTORS[step]))[layer["name"]]
        assert drops[step] == round(share * layer["offered"])
    assert (layer["capacity"]["rank"] is None) is (spec == "reroute")


def test_a_changed_factor_keeps_the_policys_rule() -> None:
    policy = capacity.build({"name": "first_come", "factor": 1.0, "rule": "vmoe"})
    changed = policy.with_factor(2.0)
    assert (changed._limit.rule, changed._limit.factor, policy._limit.factor) == ("vmoe", 2.0, 1.0)


@pytest.mark.parametrize("router", ["switch", {"name": "top_k", "k": 2}, "expert_choice", "soft"])
def test_every_kind_of_router_has_a_report(router: str | dict[str, object]) -> None:
    model = moezoo.build(CONFIG, seed=0, router=router, allow_noncausal=True).train()
    made = report(model, batches())
    assert model.training
    assert [text["name"] for text in made.document["streams"]] == ["encoder", "decoder"]
    for layer in made.document["layers"]:
        assert (layer["kind"] == "soft") is (router == "soft")
        assert (layer["capacity"] is None) is (router == "soft")
        assert sum(unpacked(layer["confidence_bins"])) == layer["offered"] == sum(layer["load"])
        shown = unpacked(layer["expert"])
        assert len(shown) == layer["choices"] * made.document["streams"][layer["stream"]]["shown"]
    assert json.loads(made.json()) == made.document


def test_two_choices_of_a_token_stand_by_falling_share() -> None:
    model = moezoo.build(CONFIG, seed=0, router={"name": "top_k", "k": 2})
    for layer in report(model, batches()).document["layers"]:
        share = unpacked(layer["share"])
        assert layer["choices"] == 2
        assert all(a >= b for a, b in zip(share[::2], share[1::2], strict=True))


def test_a_dense_model_is_one_expert_per_mlp() -> None:
    model = moezoo.build(CONFIG, seed=0, num_experts=0)
    batch = batches(1)[0] | {"attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])}
    document = report(model, [batch]).document
    assert document["dense"]
    assert [layer["label"] for layer in document["layers"]] == [
        "encoder 0", "encoder 1", "decoder 0", "decoder 1",
    ]  # fmt: skip
    assert [layer["load"] for layer in document["layers"]] == [[14], [14], [8], [8]]


def test_a_plugged_model_of_others_is_reported_with_the_ids_of_its_batch() -> None:
    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(30, 16)
            self.mlp = moezoo.SparseMLP(16, 24, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.table(input_ids))

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    (stream,) = report(Foreign(), [{"input_ids": ids}], tokenizer=str).document["streams"]
    assert [stream["pieces"][row] for row in unpacked(stream["piece"])] == list("123456")


def test_what_cannot_be_reported_is_named() -> None:
    seen = observation()
    name = next(iter(seen.trace.by_layer))
    for asked, field in (
        (lambda: report(None), "model"),
        (lambda: report(traces.Trace({})), "model"),
        (lambda: report(seen, tokens=0), "tokens"),
        (lambda: report(seen, against=torch.nn.Linear(2, 2)), "against"),
        (lambda: report(Observation(seen.trace, {name: (None,)})), "ids"),
        (lambda: report(torch.nn.Linear(2, 2)), "model"),
    ):
        with pytest.raises(moezoo.MoezooError) as caught:
            asked()
        assert caught.value.field == field


@given(st.text(max_size=200))
def test_a_readable_piece_is_short_and_holds_no_control_character(piece: str) -> None:
    shown = readable(piece)
    assert len(shown) <= 8 * LONGEST
    assert not any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 or c == "\u2581" for c in shown)
    shown.encode()


def test_pieces_are_shown_as_people_read_them() -> None:
    assert readable("\u2581the") == " the"
    assert readable("\u2581\n\t") == " \u21b5\u21e5"
    assert readable("a\u202eb\ud800") == "a<202E>b<D800>"
    assert readable("\U0001f469\u200d\U0001f680") == "\U0001f469\u200d\U0001f680"
    assert len(readable("x" * 10**6)) == LONGEST
