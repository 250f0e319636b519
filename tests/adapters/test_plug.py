"""Plugging mixtures into models of torch and transformers."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo.adapters.sparse import sparse


def encoder(**options: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_torch_encoder_computes_the_same_after_plugging(norm_first: bool) -> None:
    model, x = encoder(norm_first=norm_first), torch.randn(2, 5, 16)
    expected = model(x)
    names = moezoo.plug(model, nn.TransformerEncoderLayer, sparse(4))
    assert names == ["layers.0", "layers.1", "layers.2"]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    with moezoo.record(model) as tape:
        model.train()(x).sum().backward()
    assert len(tape.by_layer) == 3
    assert all(p.grad is not None for p in model.parameters())


def test_the_router_of_a_plugged_layer_gets_a_gradient() -> None:
    model = encoder()
    moezoo.plug(model, "layers.1", sparse(4))
    model(torch.randn(2, 5, 16)).square().sum().backward()
    gradient = model.layers[1].linear1.moe.router.classifier.weight.grad
    assert gradient.abs().max() > 0


def test_a_transformers_t5_computes_the_same_after_plugging() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_heads=2,
        num_layers=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 50, (2, 6))
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    names = moezoo.plug(model, "*.DenseReluDense", sparse(4))
    assert len(names) == 4
    found = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.generate(input_ids=ids, max_new_tokens=4).shape[0] == 2


def test_a_transformers_bert_computes_the_same_after_plugging() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(2, 50, (2, 6))
    expected = model(input_ids=ids).last_hidden_state
    names = moezoo.plug(model, re.compile(r"encoder\.layer\.\d+"), sparse(4))
    assert names == ["encoder.layer.0", "encoder.layer.1"]
    found = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_transformers_gpt2_computes_the_same_after_plugging() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(2, 50, (2, 6))
    expected = model(input_ids=ids).logits
    assert len(moezoo.plug(model, "transformer.h.*.mlp", sparse(4, causal=True))) == 2
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    fresh = sparse(2, copy_weights=False)(transformers.GPT2LMHeadModel(config).transformer.h[0].mlp)
    first, second = fresh.moe.experts.wi
    assert not torch.equal(first, second)
    assert not fresh.moe.experts.wi_bias.any()


def test_a_module_of_your_own_can_be_replaced_by_any_other() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.again = self.mlp

    model = Stack()
    names = moezoo.plug(model, "mlp", lambda mlp: moezoo.SparseMLP(8, 16, 4))
    assert names == ["mlp"]
    assert isinstance(model.mlp, moezoo.SparseMLP)
    assert model.mlp(torch.randn(3, 8)).shape == (3, 8)
    names = moezoo.plug(Stack(), lambda name, module: isinstance(module, nn.Sequential), sparse(2))
    assert names == ["mlp", "again"]


def test_fresh_weights_differ_from_the_dense_ones() -> None:
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model = nn.ModuleDict({"mlp": mlp})
    moezoo.plug(model, "mlp", sparse(4, copy_weights=False))
    experts = model["mlp"].moe.experts
    assert not torch.equal(experts.wi[0], mlp[0].weight)
    assert not torch.equal(experts.wi[0], experts.wi[1])
    twice = nn.Sequential(*mlp, nn.Linear(8, 8))
    other = sparse(4, copy_weights=False)(twice).moe.experts
    assert not torch.equal(other.expert(0)[0].weight, twice[0].weight)
    assert not torch.equal(other.expert(0)[0].weight, other.expert(1)[0].weight)


class Optional(nn.Module):
    """An MLP with an argument that a mixture has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.inner(hidden_states)
        return found


def test_experts_are_called_by_the_words_of_the_mlp() -> None:
    mlp, x = Optional(), torch.randn(2, 5, 8)
    layer = sparse(4)(mlp).eval()
    for found in (layer(x), layer(hidden_states=x)):
        torch.testing.assert_close(found, mlp(x))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    with moezoo.record(layer) as tape:
        layer(hidden_states=x, mask=mask)
    ((routing,),) = tape.by_layer.values()
    assert torch.equal(routing.real, mask.flatten())
    with pytest.raises(moezoo.MoezooError, match="is called with one"):
        layer(x, mask)


class Scaled(nn.Module):
    """An MLP with arguments that experts know nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(
        self, x: Tensor, scale: float = 1.0, *, gate: Tensor | None = None, token_ids: Any = None
    ) -> Tensor:
        y: Tensor = scale * self.inner(x)
        y = y if gate is None else gate * y
        return y if token_ids is None else 2.0 * y


def test_arguments_that_change_what_the_mlp_does_are_not_dropped() -> None:
    mlp, x = Scaled(), torch.randn(2, 5, 8)
    layer = sparse(4)(mlp).eval()
    for found in (layer(x, 1.0), layer(x, scale=1.0, gate=None), layer(x=x, token_ids=None)):
        torch.testing.assert_close(found, mlp(x))
    ids = torch.zeros(2, 5, dtype=torch.long)
    for args, kwargs, name in (
        ((x, 2.0), {}, "scale"),
        ((x,), {"scale": 2.0}, "scale"),
        ((x,), {"gate": torch.ones(8)}, "gate"),
        ((x,), {"token_ids": ids}, "token_ids"),
    ):
        with pytest.raises(moezoo.MoezooError, match=f"take no '{name}', .* is called with one"):
            layer(*args, **kwargs)
    hashed = sparse(4, router={"name": "hash", "vocab_size": 9}, capacity="dropless")(mlp)
    torch.testing.assert_close(hashed(x, token_ids=ids), mlp(x))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softsign()])  # stacked, and one by one
def test_what_is_frozen_stays_frozen(activation: nn.Module) -> None:
    mlp = nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 8))
    mlp[0].weight.requires_grad_(False)
    mlp[2].bias.requires_grad_(False)
    moe = sparse(4)(mlp).moe
    trained = {tuple(p.shape[-2:]) for p in moe.experts.parameters() if p.requires_grad}
    frozen = [p for p in moe.experts.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == 4 * (8 * 16 + 8)
    assert (8, 16) in trained and moe.router.classifier.weight.requires_grad
    mlp.requires_grad_(False)
    assert not any(p.requires_grad for p in sparse(4)(mlp).moe.experts.parameters())
    assert all(p.requires_grad for p in sparse(4, copy_weights=False)(mlp).parameters())


def test_weights_that_are_shared_are_not_parted_in_silence() -> None:
    def mlp() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8, False), nn.ReLU(), nn.Linear(8, 8, False))

    model = nn.ModuleDict({"first": mlp(), "second": mlp(), "third": mlp()})
    model["second"][0].weight = model["first"][0].weight
    for where in ("second", "*"):
        with pytest.raises(moezoo.MoezooError, match="'0.weight' of .* is also a weight of other"):
            moezoo.plug(model, where, sparse(4))
    assert type(model["third"]) is nn.Sequential
    model["third"][0].weight = model["third"][2].weight  # within one: its copies are tied, too
    x = torch.randn(5, 8)
    expected = model["third"](x)
    moezoo.plug(model.eval(), "third", sparse(4))
    torch.testing.assert_close(model["third"](x), expected)
    assert len(list(model["third"].moe.experts.parameters())) == 4


def test_experts_are_not_put_into_experts() -> None:
    model = encoder()
    moezoo.plug(model, "layers.*", sparse(4))
    with pytest.raises(moezoo.MoezooError, match="holds experts already"):
        moezoo.plug(model, "layers.*", sparse(4))


def test_a_model_with_a_make_of_ones_own_is_pickled_and_copied() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8)})
    moezoo.plug(model, "mlp", lambda old: moezoo.SparseMLP(8, 16, 4))
    x = torch.randn(3, 8)
    for again in (pickle.loads(pickle.dumps(model.eval())), copy.deepcopy(model)):
        assert torch.equal(again["mlp"](x), model["mlp"](x))
        with pytest.raises(moezoo.MoezooError, match="only `sparse` can be named"):
            moezoo.save(again, "nowhere")


def test_nothing_is_replaced_when_one_replacement_fails() -> None:
    model = encoder()
    before = list(model.layers)
    calls = []

    def failing(module: nn.Module) -> nn.Module:
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("no")
        return sparse(4)(module)

    with pytest.raises(RuntimeError):
        moezoo.plug(model, nn.TransformerEncoderLayer, failing)
    assert list(model.layers) == before
    assert isinstance(before[0].linear1, nn.Linear)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layers.0.linear9", "layers.0.linear"),
        (nn.Conv2d, "matches no module"),
        (3, "where|cannot"),
    ],
)
def test_a_search_that_finds_nothing_says_so(where: object, message: str) -> None:
    with pytest.raises(moezoo.MoezooError, match=message):
        moezoo.plug(encoder(), where, sparse(2))


def test_a_module_that_is_no_mlp_is_refused() -> None:
    with pytest.raises(moezoo.MoezooError, match="no MLP"):
        moezoo.plug(encoder(), "layers.0.self_attn", sparse(2))
    with pytest.raises(moezoo.MoezooError, match="did not return a module"):
        moezoo.plug(encoder(), "layers.0", lambda module: None)
