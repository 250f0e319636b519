"""What a newcomer types wrong is answered by what would have been right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moezoo
from moezoo import experts, routers
from moezoo.adapters.plug import plug
from moezoo.adapters.sparse import sparse
from moezoo.cli import main
from moezoo.dtypes import FLOATING, as_dtype, dtype_word
from moezoo.errors import ConfigError, MoezooError
from moezoo.registry import meant

SIZES = {"vocab_size": 64, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2}


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def recorded(layer: nn.Module, x: torch.Tensor) -> moezoo.recording.Tape:  # type: ignore[name-defined]
    with moezoo.record(layer) as tape:
        layer(x)
    return tape


def _model() -> nn.Module:
    return moezoo.build(moezoo.SwitchConfig(**SIZES), seed=0)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "router": (lambda: moezoo.SparseMLP(8, 16, 4, router="topk"), "Did you mean 'top_k'"),
    "number": (
        lambda: moezoo.SparseMLP(8, 16, 4, capacity=1.25),
        'found 1.25. Did you mean {"name": "switch", "factor": 1.25}',
    ),
    "number in a config": (
        lambda: moezoo.SwitchConfig(**SIZES, num_experts=2, capacity=2.0),
        'Did you mean {"name": "switch", "factor": 2}',
    ),
    "choices": (
        lambda: moezoo.SparseMLP(8, 16, 4, router=2),
        'Did you mean {"name": "top_k", "k": 2}',
    ),
    "upcycled router": (
        lambda: moezoo.upcycle(_model(), num_experts=2, router="topk"),
        "Did you mean 'top_k'",
    ),
    "upcycled capacity": (
        lambda: moezoo.upcycle(_model(), num_experts=2, capacity=1.25),
        'Did you mean {"name": "switch", "factor": 1.25}',
    ),
    "device": (
        lambda: moezoo.build("t5-small", device="gpu"),
        r"no device 'gpu': torch knows none .*cpu here; a GPU .* is called cuda",
    ),
    "dtype": (lambda: moezoo.build("t5-small", dtype="bfloat61"), "Did you mean 'bfloat16'"),
    "names for modules": (
        lambda: moezoo.MoE("switch", "stacked"),  # type: ignore[arg-type]
        "MoE takes a Router, a module; found 'switch'. moezoo.SparseMLP.*takes names",
    ),
    "a number for modules": (
        lambda: moezoo.MoE(routers.build("switch", d_model=8, num_experts=4), 8),  # type: ignore[arg-type]
        "MoE takes an Experts, a module; found 8",
    ),
    "no capacity": (
        lambda: moezoo.MoE(
            routers.build("switch", d_model=8, num_experts=4),
            experts.build("stacked", d_model=8, d_ff=8, num_experts=4),
        ),
        "MoE takes a CapacityPolicy, a module; found None",
    ),
    "a number for weights": (
        lambda: recorded(moezoo.SparseMLP(8, 16, 4), torch.randn(2, 8)).loss(0.01),
        r"found 0.01. Such as tape.loss\({'load_balance': 0.01}\); tape.loss\(\)",
    ),
    "an instance": (
        lambda: plug(encoder(), "layers.*", moezoo.SparseMLP(8, 16, 4)),
        r"found SparseMLP. Pass lambda old: .*sparse\(8\)",
    ),
    "a function that was not called": (
        lambda: plug(encoder(), "layers.*", sparse),  # type: ignore[arg-type]
        r"found Sparse. Such as .*sparse\(8\), with its number of experts",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_what_helps(mistake: str) -> None:
    do, answer = MISTAKES[mistake]
    with pytest.raises(MoezooError, match=answer) as found:
        do()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        (["--router", "topk"], "Did you mean 'top_k'"),
        (["--capacity", "1.25"], '{"name": "switch", "factor": 1.25}'),
        (["--dtype", "bf61"], "unknown dtype 'bf61'. Known: "),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_too(
    option: list[str], answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moezoo.save(_model(), tmp_path / "t5")
    words = ["upcycle", str(tmp_path / "t5"), str(tmp_path / "out"), "--experts", "2"]
    assert main([*words, *option]) == 2
    assert answer in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "number"), [("capacity", 1.25), ("capacity", "2"), ("router", 3)])
def test_what_is_meant_by_a_number_can_be_built(kind: str, number: object) -> None:
    hint = meant(kind, number)
    assert hint is not None
    spec = json.loads(hint.removeprefix("Did you mean ").removesuffix("?"))
    layer = moezoo.SparseMLP(8, 16, 4, **{kind: spec})
    found = layer.moe.router.choices if kind == "router" else repr(layer.moe.capacity)
    assert found == number if kind == "router" else f"factor={float(number)}" in found
    assert meant("expert container", number) is meant(kind, "dropless") is None


@pytest.mark.parametrize("word", FLOATING)
def test_a_dtype_is_a_word_or_torchs(word: str, tmp_path: Path) -> None:
    wanted = getattr(torch, word)
    assert as_dtype(word) is as_dtype(f"torch.{word}") is as_dtype(wanted) is wanted
    assert dtype_word(wanted) == word
    assert as_dtype(None) is None
    model = moezoo.build(moezoo.SwitchConfig(**SIZES), dtype=word, seed=0)
    assert model.shared.weight.dtype is wanted
    if word == "float64":
        return
    moezoo.save(_model(), tmp_path / "t5")
    assert moezoo.load(tmp_path / "t5", dtype=word).shared.weight.dtype is wanted
    for spelling in (word, wanted):
        made = moezoo.upcycle(_model(), num_experts=2, dtype=spelling)
        assert made.shared.weight.dtype is wanted


def test_short_words_of_dtypes_are_known_and_no_others_are_taken() -> None:
    assert [dtype_word(w) for w in ("bf16", "half", "fp32")] == ["bfloat16", "float16", "float32"]
    for bad in ("int8", torch.int64, 16):
        with pytest.raises(ConfigError, match="dtype"):
            as_dtype(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", routers.names())
def test_the_loss_without_weights_is_that_of_the_routers_paper(name: str) -> None:
    layer = moezoo.SparseMLP(8, 16, 4, router=name, vocab_size=50).train()
    x, ids = torch.randn(3, 5, 8), torch.randint(0, 50, (3, 5))
    with moezoo.record(layer) as tape:
        layer(x, token_ids=ids)
    weights = {n: w for n, w in layer.moe.router.default_losses.items() if w}
    try:
        wanted = tape.loss(weights)
    except ConfigError:  # a loss that this router cannot feed is none of its defaults
        wanted = torch.zeros(())
    torch.testing.assert_close(tape.loss(), wanted)


@pytest.mark.parametrize("chosen", [None, {"load_balance": 0.5, "z": {"coefficient": 0.25}}])
def test_the_loss_without_weights_is_that_of_the_models_config(chosen: object) -> None:
    config = moezoo.SwitchConfig(**SIZES, num_experts=4, router_losses=chosen)
    model = moezoo.build(config, seed=0).train()
    ids = torch.randint(2, 64, (2, 7))
    with moezoo.record(model) as tape:
        out = model(ids, labels=ids)
    extra = out.loss - out.losses["cross_entropy"]
    assert extra > 0
    torch.testing.assert_close(tape.loss(), extra)
    tape.loss().backward()
    assert all(layer.router.classifier.weight.grad is not None for layer in tape.layers.values())
