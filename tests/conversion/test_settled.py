"""What a recipe leaves open and how a router of weight 1 is folded, by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from moezoo.adapters.upcycle.folding import FOLD, fold_factor, folded_config
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.upcycle.target import BY_CHOICE, BY_PROBABILITY, settled
from moezoo.cli import main
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.training.recipes import RECIPES
from tests.conversion.decoders import dense_decoder

SMALL = SwitchConfig(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=2)


@pytest.mark.parametrize(
    ("activation", "layout", "init", "router", "std"),
    [
        ("relu", "auto", "copy", BY_PROBABILITY, None),
        ("relu", "moezoo", "copy", BY_CHOICE, 0.02),
        ("gated-gelu", "auto", "copy", BY_CHOICE, 0.02),
        ("gated-gelu", "huggingface", "copy", BY_PROBABILITY, None),
        ("relu", "auto", "virtual_group:2", BY_PROBABILITY, 0.5),
        ("relu", "auto", "split", BY_PROBABILITY, None),
    ],
)
def test_an_open_router_is_settled(
    activation: str, layout: str, init: str, router: Any, std: float | None
) -> None:
    source = SMALL.replace(feed_forward_proj=activation)
    found = settled(Recipe(4, init=init), source, "model", layout=layout)
    rows = "normal" if std is None else {"name": "normal", "std": std}
    assert (found.router, found.router_init) == (router, rows)
    assert settled(found, source, "model", layout=layout) == found


def test_a_folded_layer_chooses_and_computes_what_it_did() -> None:
    unit = moezoo.build(
        SMALL.replace(num_experts=4, router=BY_CHOICE, capacity="dropless"), task="encoder", seed=1
    ).eval()
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            if ".router." in name:
                parameter.normal_(0.0, 0.5)
    plain = moezoo.build(folded_config(unit.config), task="encoder").eval()
    state = unit.state_dict()
    plain.load_state_dict({name: fold_factor(name, 4) * state[name] for name in state})
    ids = torch.arange(2, 16)[None]
    with torch.no_grad():
        before, after = unit(ids), plain(ids)
    assert plain.config.wo_scale == 4.0
    assert torch.equal(before.routing[0].assignment.expert, after.routing[0].assignment.expert)
    torch.testing.assert_close(
        after.last_hidden_state, before.last_hidden_state, rtol=0, atol=20 * FOLD
    )


def test_training_after_upcycling_moves_routers_slowly() -> None:
    assert RECIPES["upcycle"].router_learning_rate == 0.01


@pytest.mark.parametrize("kind", ["t5", "llama", "live t5"])
def test_a_router_is_said_alike_in_python_a_file_and_a_command(kind: str, tmp_path: Path) -> None:
    if kind == "live t5":
        live = moezoo.upcycle(moezoo.build(SMALL, seed=0), num_experts=4, router="top_k:3",
                              capacity="switch:1.5")  # fmt: skip
        assert live.config.router == {"name": "top_k", "k": 3}
        assert live.config.capacity == {"name": "switch", "factor": 1.5}
        return
    source = tmp_path / "dense"
    dense_decoder(source) if kind == "llama" else moezoo.save(moezoo.build(SMALL, seed=0), source)
    file = tmp_path / "recipe.toml"
    file.write_text('num_experts = 4\nrouter = "top_k:3"\n')
    moezoo.upcycle(source, tmp_path / "a", num_experts=4, router="top_k:3")
    assert main(["upcycle", str(source), str(tmp_path / "b"), "--recipe", str(file)]) == 0
    words = ["--experts", "4", "--router", "top_k:3"]
    assert main(["upcycle", str(source), str(tmp_path / "c"), *words]) == 0
    first, *others = (json.loads((tmp_path / n / "recipe.json").read_text()) for n in "abc")
    assert first["router"] == {"name": "top_k", "k": 3}
    assert others == [first, first]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"router": "top_k:1,2"}, "takes 1 options without a name; found 1,2. Say name:option"),
        ({"router": "top_k:two"}, "the router's k is out of range.*found 'two'"),
        ({"router": "switch:2"}, "router 'switch' has no option 'k'"),
        ({"capacity": "dropless:2"}, "'dropless' has no option 'factor'"),
    ],
)
def test_a_value_that_a_component_does_not_take_is_refused(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        moezoo.upcycle(moezoo.build(SMALL, seed=0), num_experts=4, **values)
