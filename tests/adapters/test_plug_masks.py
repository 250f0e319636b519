"""A plugged model's own mask reaches its sparse layers."""

from __future__ import annotations

import copy
import io
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo.adapters.sparse import sparse

from .plugged import GPT2, MASK, SIZES, T5, Block, hugging_face, ids, lively, mine, reals

MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertModel", "BertConfig", SIZES, r"encoder\.layer\.\d+"),
    "electra": ("ElectraModel", "ElectraConfig", {**SIZES, "embedding_size": 16},
                r"encoder\.layer\.\d+"),
    "distilbert": ("DistilBertModel", "DistilBertConfig",
                   {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
                   r"transformer\.layer\.\d+\.ffn"),
    "gpt2": ("GPT2Model", "GPT2Config", GPT2, r"h\.\d+\.mlp"),
    "llama": ("LlamaModel", "LlamaConfig", SIZES, r"layers\.\d+\.mlp"),
    "neox": ("GPTNeoXModel", "GPTNeoXConfig", SIZES, r"layers\.\d+\.mlp"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_is_not_routed_and_changes_no_real_token(name: str) -> None:
    kind, config, options, where = MODELS[name]
    model = hugging_face(kind, config, **options)
    expected = model(input_ids=ids(), attention_mask=MASK).last_hidden_state
    assert len(moezoo.plug(model, re.compile(where), sparse(4))) == 2
    with moezoo.record(model) as tape:
        found = model(input_ids=ids(), attention_mask=MASK).last_hidden_state
    real = MASK.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    for (routing,) in tape.by_layer.values():
        assert torch.equal(routing.real, real.flatten())
    other = torch.where(real, ids(), ids(1))
    changed = model(input_ids=other, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(changed[real], found[real])
    assert model(input_ids=ids()).last_hidden_state.isfinite().all()


@torch.no_grad()
def test_each_stack_of_a_t5_gets_its_own_mask() -> None:
    model = hugging_face("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0)
    real = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    arguments = {"input_ids": ids(), "attention_mask": MASK, "decoder_input_ids": ids(1)}
    expected = model(**arguments, decoder_attention_mask=real).logits
    moezoo.plug(model, "*.DenseReluDense", sparse(4, causal=True))
    with moezoo.record(model) as tape:
        found = model(**arguments, decoder_attention_mask=real).logits
    keep = real.bool()
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-4, rtol=1e-4)
    for layer, (routing,) in tape.by_layer.items():
        wanted = MASK if layer.startswith("encoder") else real
        assert torch.equal(routing.real, wanted.bool().flatten())


@torch.no_grad()
def test_a_plugged_decoder_with_a_cache_generates_what_the_dense_one_does() -> None:
    model = hugging_face("GPT2LMHeadModel", "GPT2Config", **GPT2, eos_token_id=49)
    left = MASK.flip(1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids(), attention_mask=left, **options)
    moezoo.plug(model, "transformer.h.*.mlp", sparse(4, causal=True))
    assert torch.equal(model.generate(input_ids=ids(), attention_mask=left, **options), expected)


SMALL_GEMMA = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}
STATIC: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES, "model.layers.*.mlp"),
    "gemma": ("Gemma3ForCausalLM", "Gemma3TextConfig",
              {**SIZES, **SMALL_GEMMA, "num_hidden_layers": 6}, "model.layers.*.mlp"),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0},
           "*.DenseReluDense"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_a_static_cache_hides_no_padding(name: str) -> None:
    kind, config, sizes, where = STATIC[name]
    model: Any = hugging_face(kind, config, **sizes, eos_token_id=49, pad_token_id=0)
    given = {"input_ids": ids(), "attention_mask": MASK.flip(1), "cache_implementation": "static"}
    expected = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    moezoo.plug(model, where, sparse(4))
    with moezoo.record(model) as tape:
        found = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
    for layer, (first, *others) in tape.by_layer.items():
        if "decoder" not in layer:
            assert torch.equal(first.real, MASK.flip(1).bool().flatten())
        assert all(bool(r.real.all()) and r.real.numel() == 2 for r in others)


@torch.no_grad()
def test_a_mask_of_what_attends_to_what_tells_which_tokens_are_real() -> None:
    model = hugging_face("LlamaModel", "LlamaConfig", **SIZES)
    moezoo.plug(model, "layers.*.mlp", sparse(2))
    allowed = torch.ones(6, 6).tril().bool() & MASK.flip(1).bool()[:, None, None]
    for mask in (allowed, torch.where(allowed, 0.0, -1e4)):
        with moezoo.record(model) as tape:
            model(input_ids=ids(), attention_mask=mask)
        for (routing,) in tape.by_layer.values():
            assert torch.equal(routing.real, MASK.flip(1).bool().flatten())


RECOMPUTED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES, "model.layers.*.mlp"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "transformer.h.*.mlp"),
    "bert": ("BertModel", "BertConfig", {**SIZES, "attention_probs_dropout_prob": 0.0},
             "encoder.layer.?"),
    "t5": ("T5Model", "T5Config", {**T5, "dropout_rate": 0.0}, "*.DenseReluDense"),
}  # fmt: skip


def loss_of(model: Any, mask: Tensor, seed: int = 0) -> Tensor:
    given = {"input_ids": ids(seed), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids(seed + 7)
    found: Tensor = model(**given)[0]
    return found.square().mean()


@pytest.mark.parametrize("name", RECOMPUTED)
def test_blocks_that_transformers_recomputes_have_their_mask(name: str) -> None:
    kind, config, options, where = RECOMPUTED[name]
    model: Any = hugging_face(kind, config, **options)
    model.config.use_cache = False
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    policy = {"name": "first_come", "factor": 1.0}
    moezoo.plug(model, where, sparse(4, capacity=policy, causal=name != "bert"))
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        # Two at once: each block has the mask of its own call.
        (loss_of(model, MASK) + loss_of(model, MASK.flip(0), 1)).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, msg=key)
    unmasked = {n: p for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (loss_of(model, MASK | 1) + loss_of(model, MASK | 1, 1)).backward()
    assert any(not torch.allclose(p.grad, found[0][n]) for n, p in unmasked.items() if "moe" in n)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(moezoo.MoezooError, match="Pass use_reentrant=False"):
        model.enable_input_require_grads()
        loss_of(model, MASK).backward()


def test_what_a_model_is_called_with_is_left_as_it_is() -> None:
    model: Any = hugging_face("LlamaForCausalLM", "LlamaConfig", **SIZES)
    moezoo.plug(model, "model.layers.*.mlp", sparse(4))
    given = ids()
    logits = model(input_ids=given, attention_mask=MASK).logits
    assert not vars(given) and not vars(logits)
    file = io.BytesIO()
    torch.save({"ids": given, "logits": logits.detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["ids"], given)


@pytest.mark.filterwarnings("ignore:Position ids are not:UserWarning")
@pytest.mark.parametrize("tuning", ["LoraConfig", "PromptTuningConfig"])
@torch.no_grad()
def test_a_model_that_peft_wrapped_before_hides_no_padding(tuning: str) -> None:
    peft = pytest.importorskip("peft")
    options: Any = (
        {"r": 2, "fan_in_fan_out": True} if tuning == "LoraConfig" else {"num_virtual_tokens": 3}
    )
    config = getattr(peft, tuning)(task_type="CAUSAL_LM", **options)
    model: Any = peft.get_peft_model(hugging_face("GPT2LMHeadModel", "GPT2Config", **GPT2), config)
    moezoo.plug(model.eval(), "*.h.*.mlp", sparse(4, causal=True))
    left, virtual = (
        MASK.flip(1),
        model.peft_config["default"].to_dict().get("num_virtual_tokens", 0),
    )
    real = nn.functional.pad(left, (virtual, 0), value=1).bool().flatten()
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=1, do_sample=False)):
        with moezoo.record(model) as tape:
            call(input_ids=ids(), attention_mask=left)
        for (routing,) in tape.by_layer.values():
            assert torch.equal(routing.real, real)


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_a_torch_encoder_with_a_padding_mask(
    batch_first: bool, norm_first: bool, activation: str, masked: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, 0.0, batch_first=batch_first, norm_first=norm_first, activation=activation
    )
    nested = batch_first and not norm_first
    model = lively(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))
    x = torch.randn(2, 6, 16)
    x = x if batch_first else x.transpose(0, 1)
    padding = MASK == 0 if masked else None
    keep = MASK.bool() if masked else MASK >= 0
    keep = keep if batch_first else keep.t()
    expected = model(x, src_key_padding_mask=padding)
    moezoo.plug(model, "layers.*", sparse(4, group="sequence"))
    with moezoo.record(model) as tape:
        found = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    for (routing,) in tape.by_layer.values():
        assert routing.assignment.group_size == 6
        assert masked is (routing.real is not None)
        assert not masked or torch.equal(routing.real, MASK.bool().flatten())
    model.train()
    assert model(x, src_key_padding_mask=padding).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_a_torch_transformer_gives_each_stack_its_own_mask(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = lively(nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=batch_first))
    source, target = torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    masks = {"src_key_padding_mask": MASK == 0, "tgt_key_padding_mask": MASK.flip(0) == 0}
    masks["memory_key_padding_mask"] = MASK == 0
    expected = model(source, target, **masks)
    moezoo.plug(model, re.compile(r"\w+\.layers\.0"), sparse(4, causal=True))
    with moezoo.record(model) as tape:
        found = model(source, target, **masks)
    keep = MASK.flip(0).bool() if batch_first else MASK.flip(0).bool().t()
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-5)
    (encoded,), (decoded,) = tape.by_layer.values()
    assert torch.equal(encoded.real, MASK.bool().flatten())
    assert torch.equal(decoded.real, MASK.flip(0).bool().flatten())


def test_recomputed_blocks_see_the_mask_of_their_own_call() -> None:
    x = torch.randn(2, 6, 8)
    gradients = []
    for how in (None, False):
        model = mine(how)
        one = model(x.clone().requires_grad_(), attention_mask=MASK)
        two = model(x.clone().requires_grad_(), attention_mask=MASK.flip(0))
        (one.square().sum() + two.square().sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
        assert not any(carrier.held for carrier in carriers(model))
    torch.testing.assert_close(gradients[1], gradients[0])
    with pytest.raises(moezoo.MoezooError, match="use_reentrant=False"):
        mine(True)(x.requires_grad_(), attention_mask=MASK).sum().backward()


def carriers(model: nn.Module) -> list[Any]:
    return [hook.__self__ for hook in model._forward_pre_hooks.values()]


def test_threads_copies_and_files_have_masks_of_their_own() -> None:
    model, x = mine(), torch.randn(2, 6, 8)
    found: dict[int, list[Tensor | None]] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            mask = MASK if number % 2 else MASK.flip(0)
            found[number] = [model(x, mask) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outputs in found.items():
        with torch.no_grad():
            expected = model(x, MASK if number % 2 else MASK.flip(0))
        for output in outputs:
            assert torch.equal(output, expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert all(torch.equal(r, MASK.bool().flatten()) for r in reals(twin, x, MASK))
        assert carriers(twin) != carriers(model)


@torch.no_grad()
def test_a_compiled_model_routes_no_padding() -> None:
    model, x = mine(), torch.randn(2, 6, 8)
    expected = model(x, MASK)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x, MASK), expected)
    torch.testing.assert_close(compiled(x, MASK.flip(0)), model(x, MASK.flip(0)))


def test_a_failed_call_leaves_nothing_behind() -> None:
    model = mine()
    with pytest.raises(moezoo.MoezooError, match="does not fit the tokens"):
        model(torch.randn(2, 6, 8), MASK[:, :5])
    assert reals(model, torch.randn(2, 6, 8)) == [None, None]
    assert not any(carrier.held for carrier in carriers(model))


def test_the_mask_can_be_named_given_and_refused() -> None:
    x = torch.randn(2, 6, 8)
    for option in ("attention_mask", lambda arguments: arguments["attention_mask"].bool()):
        real = reals(mine(mask=option), x, attention_mask=MASK)
        assert all(torch.equal(r, MASK.bool().flatten()) for r in real)
    assert reals(mine(mask=False), x, attention_mask=MASK) == [None, None]
    with pytest.raises(moezoo.MoezooError, match="no argument 'masks'"):
        mine(mask="masks")
    with pytest.raises(moezoo.MoezooError, match="cannot find a mask with this"):
        mine(mask=True)

    class Unclear(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    with pytest.raises(moezoo.MoezooError, match="'mask', which may be of either kind"):
        moezoo.plug(Unclear(), "mlp", sparse(2))
    model = Unclear()
    moezoo.plug(model, "mlp", sparse(2), mask="mask")
    assert torch.equal(reals(model, x, MASK)[0], MASK.bool().flatten())


def test_several_texts_of_an_example_have_their_masks() -> None:
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: Any = hugging_face("BertForMultipleChoice", "BertConfig", **sizes)
    given = {"input_ids": torch.stack([ids(1), ids(2), ids(3)], 1)}
    mask = torch.stack([MASK, MASK.flip(0), MASK], 1)
    expected = model(**given, attention_mask=mask).logits
    moezoo.plug(model, "bert.encoder.layer.?", sparse(2))
    with moezoo.record(model) as tape:
        found = model(**given, attention_mask=mask).logits
    torch.testing.assert_close(found, expected)
    for (routing,) in tape.by_layer.values():
        assert torch.equal(routing.real, mask.bool().flatten())


class TimeFirst(nn.Module):
    """Takes (B, L, D), and calls its MLP with (L, B, D), by a word."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp: nn.Module = Named()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.mlp(x=x.transpose(0, 1)).transpose(0, 1)
        return y


class Named(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_tokens_before_texts_are_said_to_be_so() -> None:
    x, model = torch.randn(2, 6, 8), TimeFirst()
    moezoo.plug(model, "mlp", sparse(2))
    with pytest.raises(moezoo.MoezooError, match="Pass batch_first=False to sparse"):
        model(x, MASK)
    for make in (
        sparse(2, batch_first=False),
        lambda old: moezoo.SparseMLP(8, 16, 2, batch_first=False),
    ):
        model = TimeFirst()
        moezoo.plug(model, "mlp", make)
        assert torch.equal(reals(model, x, MASK)[0], MASK.bool().flatten())


def test_floats_are_read_by_what_their_argument_is_called() -> None:
    x = torch.randn(2, 6, 8)
    assert torch.equal(reals(mine(), x, MASK.float())[0], MASK.bool().flatten())
    with pytest.raises(moezoo.MoezooError, match="not 0 and 1"):
        mine()(x, torch.where(MASK.bool(), 0.0, -1e9))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    moezoo.plug(encoder, "layers.0", sparse(2))
    additive = torch.where(MASK.bool(), 0.0, float("-inf"))
    found = reals(encoder.eval(), x, src_key_padding_mask=additive)[0]
    assert torch.equal(found, MASK.bool().flatten())
