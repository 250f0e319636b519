"""What is no MLP is refused by name, and so are routers that see what a decoder may not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm

import moezoo
from moezoo.adapters.sparse import sparse

from ..observed.observers import code
from .plugged import GPT2, SIZES, T5, Mine, hugging_face

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.mark.parametrize(
    ("kind", "config", "options", "where", "reason"),
    [
        ("GPT2Model", "GPT2Config", GPT2, r"h\.0", "GPT2Block"),
        ("LlamaModel", "LlamaConfig", SIZES, r"layers\.0", "LlamaDecoderLayer"),
        ("LlamaModel", "LlamaConfig", SIZES, r"layers\.0\.self_attn", "LlamaAttention"),
        ("T5EncoderModel", "T5Config", T5, r"encoder\.block\.0", "T5Block.*returns a tuple"),
        ("ViTModel", "ViTConfig", VIT,
         r".*layers?\.0", "ViTLayer.*mixes tokens"),
    ],
)  # fmt: skip
def test_what_is_no_mlp_is_refused_by_name(
    kind: str, config: str, options: dict[str, Any], where: str, reason: str
) -> None:
    model = hugging_face(kind, config, **options)
    before = dict(model.named_modules())
    with pytest.raises(moezoo.MoezooError, match=reason):
        moezoo.plug(model, re.compile(where), sparse(2))
    assert dict(model.named_modules()) == before


class Halves(nn.TransformerEncoderLayer):
    """Its MLP is another one than its attributes say."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.activation(self.linear1(x)) ** 2))


class Twice(nn.TransformerEncoderLayer):
    """Its MLP is what its attributes say, and then something."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 2.0 * super()._ff_block(x)


@torch.no_grad()
def test_a_layer_with_another_feed_forward_is_refused_or_right() -> None:
    torch.manual_seed(0)
    # torch's inference path, which (B, L, D) takes, passes by what a subclass overrides.
    for kind, batch_first in ((Halves, False), (Halves, True), (Twice, True)):
        with pytest.raises(moezoo.MoezooError, match=f"{kind.__name__} .* something else"):
            layer = kind(16, 2, 32, batch_first=batch_first)
            moezoo.plug(nn.ModuleList([layer]), "0", sparse(2))
    model = nn.ModuleList([Twice(16, 2, 32)]).eval()
    x = torch.randn(3, 2, 16)
    expected = model[0](x)
    moezoo.plug(model, "0", sparse(2))
    torch.testing.assert_close(model[0](x), expected, atol=1e-5, rtol=1e-5)


def test_zeros_hide_nothing_and_a_trial_leaves_no_trace() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wi, self.wo = nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.zeros_(self.wo.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.wo(self.wi(x).cumsum(-2))

    model, state = Mixes(), torch.get_rng_state()
    with pytest.raises(moezoo.MoezooError, match="mixes tokens"):
        sparse(2)(model)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(moezoo.MoezooError, match="'meta'"), torch.device("meta"):
        sparse(2)(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
def test_weights_that_cannot_be_drawn_anew_are_refused() -> None:
    def mlp() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    coded, narrow, pruned, normed = mlp(), mlp(), mlp(), mlp()
    code(coded[0])
    narrow[2].weight = nn.Parameter(narrow[2].weight.detach().to(torch.float8_e4m3fn))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    weight_norm(normed[2])
    for module, reason in (
        (coded, r"'0.weight' of Sequential is quantised \(Coded\)"),
        (narrow, r"'2.weight' of Sequential is quantised \(torch.float8_e4m3fn\)"),
        (pruned, "'weight' of Linear is computed from other weights.*prune.remove"),
        (normed, "'weight' of Linear is computed from other weights"),
    ):
        with pytest.raises(moezoo.MoezooError, match=reason):
            sparse(2)(module)
    with pytest.raises(moezoo.MoezooError, match="weights without a shape"):
        sparse(2)(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 8)))
    with pytest.raises(moezoo.MoezooError, match="a scripted module cannot be taken"):
        sparse(2)(torch.jit.script(mlp()))
    prune.remove(pruned[0], "weight")
    x, layer = torch.randn(5, 8), sparse(2)(pruned).eval()
    torch.testing.assert_close(layer(x), pruned(x))


def patched(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)  # type: ignore[method-assign]


@pytest.mark.parametrize("by", ["closure", "accelerate"])
def test_a_patched_layer_that_would_go_on_with_its_mlp_is_refused(by: str) -> None:
    model = hugging_face("BertModel", "BertConfig", **SIZES)
    for layer in model.encoder.layer:
        if by == "closure":
            patched(layer)
        else:
            hooks = pytest.importorskip("accelerate.hooks")
            hooks.add_hook_to_module(layer, hooks.ModelHook())
    with pytest.raises(moezoo.MoezooError, match="does not call what is put .* is patched"):
        moezoo.plug(model, "encoder.layer.?", sparse(2))
    assert not any(isinstance(part, moezoo.SparseMLP) for part in model.modules())


def test_a_patched_mlp_whose_copies_would_share_its_weights_is_refused() -> None:
    model, x = Mine().eval(), torch.randn(2, 3, 8)
    patched(model.blocks[1].mlp)
    with pytest.raises(moezoo.MoezooError, match="same weights when it is copied"):
        moezoo.plug(model, "blocks.*.mlp", sparse(2))
    del model.blocks[1].mlp.forward
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.blocks[1].mlp, hooks.ModelHook())  # which copies take along
    expected = model(x)
    moezoo.plug(model, "blocks.*.mlp", sparse(2))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Fairseq(nn.Module):
    """An MLP, with the names that layers of BART and OPT have for the parts of theirs."""

    def __init__(self, p: float = 0.25, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)
        self.activation_fn, self.dropout_module = nn.GELU(), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.dropout_module(self.activation_fn(self.fc1(x))))
        return y


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_of_an_mlp_with_the_names_of_a_layer_stays_where_it_is(bias: bool) -> None:
    mlp, x = Fairseq(bias=bias), torch.randn(5, 8)
    layer: Any = sparse(2)(mlp).eval()
    assert isinstance(layer, moezoo.SparseMLP) and layer.moe.experts.dropout.p == 0.25
    torch.testing.assert_close(layer(x), mlp.eval()(x))


def test_a_model_inside_ddp_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Mine())
        with pytest.raises(moezoo.MoezooError, match="Plug before DistributedDataParallel"):
            moezoo.plug(wrapped, "*.mlp", sparse(2))
    finally:
        dist.destroy_process_group()


def test_routers_that_see_later_tokens_are_refused_in_decoders() -> None:
    noncausal = sparse(2, router="expert_choice", capacity="dropless")
    gpt2 = hugging_face("GPT2Model", "GPT2Config", **GPT2)
    with pytest.raises(moezoo.MoezooError, match=r"'h\.0\.mlp' is in a decoder"):
        moezoo.plug(gpt2, "h.*.mlp", noncausal)
    bert = hugging_face("BertModel", "BertConfig", **SIZES)
    assert moezoo.plug(bert, re.compile(r"encoder\.layer\.\d"), noncausal)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32), 1)
    with pytest.raises(moezoo.MoezooError, match="is in a decoder"):
        moezoo.plug(decoder, "layers.0", noncausal)
    with pytest.raises(moezoo.MoezooError, match=r"may be in a decoder.*causal=False"):
        moezoo.plug(Mine(), "blocks.*.mlp", noncausal)
    assert moezoo.plug(Mine(), "blocks.*.mlp", noncausal, causal=False)
    with pytest.raises(moezoo.MoezooError, match="is in a decoder"):
        moezoo.plug(Mine(), "blocks.*.mlp", noncausal, causal=True)
    t5 = hugging_face("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0)
    assert moezoo.plug(t5, "encoder.*.DenseReluDense", noncausal)
    with pytest.raises(moezoo.MoezooError, match="is in a decoder"):
        moezoo.plug(t5, "decoder.*.DenseReluDense", noncausal)
