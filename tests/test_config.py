"""A config is a value: it cannot change, can be a key, and survives JSON."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import moezoo
from moezoo.errors import ConfigError

OPTIONS: dict[str, Any] = {
    "num_experts": 4,
    "router": {"name": "top_k", "k": 2},
    "capacity": {"name": "switch", "factor": 1.5},
    "experts": {"name": "stacked", "dropout": 0.4},
    "shared_expert": {"d_ff": 8},
    "router_losses": {"load_balance": {"coefficient": 0.1, "scope": "batch"}, "z": 0.0},
    "encoder_sparse_layers": [1, 3],
    "eos_token_id": [1, 2],
}


def test_a_config_is_hashable_and_survives_json_copies_and_pickles() -> None:
    config = moezoo.SwitchConfig(**OPTIONS)
    twins = [
        moezoo.SwitchConfig.from_json(config.to_json()),
        moezoo.SwitchConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        config.replace(),
    ]
    assert all(twin == config and hash(twin) == hash(config) for twin in twins)
    assert {config: "found"}[twins[0]] == "found"
    assert config != config.replace(router={"name": "top_k", "k": 3})
    assert {name: config.to_dict()[name] for name in OPTIONS} == OPTIONS


@pytest.mark.parametrize(
    ("fields", "scale", "variance"),
    [
        ({"d_model": 64, "num_experts": 4}, 0.1, 0.1),
        ({"d_model": 64, "num_experts": 4, "initializer_scale": None}, None, 1.0),
        ({"d_model": 64, "num_experts": 4, "initializer_scale": 0.5}, 0.5, 0.5),
        ({"d_model": 64}, None, 1.0),
        ({"d_model": 512, "num_experts": 4}, None, 0.1),
    ],
)
def test_a_file_without_a_scale_of_initial_weights_has_the_papers(
    fields: dict[str, Any], scale: float | None, variance: float
) -> None:
    config = moezoo.SwitchConfig.from_json(json.dumps(fields))
    assert (config.initializer_scale, config.sparse_variance) == (scale, variance)
    assert moezoo.SwitchConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_a_scale_of_initial_weights_is_positive(scale: float) -> None:
    with pytest.raises(moezoo.MoezooError, match="initializer_scale must be finite and > 0"):
        moezoo.SwitchConfig(initializer_scale=scale)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.router.__setitem__("k", 3),
        lambda c: c.router.pop("k"),
        lambda c: c.experts.update(dropout=0.0),
        lambda c: c.shared_expert.clear(),
        lambda c: c.router_losses.setdefault("l1", 1.0),
        lambda c: c.router_losses["load_balance"].__delitem__("scope"),
        lambda c: c.capacity.__ior__({"factor": 9.0}),
    ],
)
def test_nothing_in_a_config_can_be_changed(change: Callable[[Any], object]) -> None:
    config = moezoo.SwitchConfig(**OPTIONS)
    with pytest.raises(TypeError, match=r"config\.replace"):
        change(config)
    assert config == moezoo.SwitchConfig(**OPTIONS)


def test_components_in_the_words_of_a_command_line_are_those_in_json() -> None:
    said = {"router": "top_k:2", "capacity": "switch:1.5", "experts": "stacked:dropout=0.4"}
    assert moezoo.SwitchConfig(**{**OPTIONS, **said}) == moezoo.SwitchConfig(**OPTIONS)
    assert moezoo.SwitchConfig(router="top_k:k=2").router == {"name": "top_k", "k": 2}
    with pytest.raises(ConfigError, match="takes 0 options without a name; found 0.4"):
        moezoo.SwitchConfig(experts="stacked:0.4")


def test_a_config_keeps_what_it_was_given_when_the_callers_values_change() -> None:
    options: dict[str, Any] = copy.deepcopy(OPTIONS)
    config = moezoo.SwitchConfig(**options)
    options["router"]["k"] = 3
    options["router_losses"]["load_balance"]["coefficient"] = 9.0
    config.to_dict()["router"]["k"] = 4
    assert config == moezoo.SwitchConfig(**OPTIONS)
