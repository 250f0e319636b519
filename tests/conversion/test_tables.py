"""Tables of tokens that are the stacks' own, that repeat the shared one, or get another size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moezoo
from moezoo.adapters import verify as verification
from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.plan import Plan, make_plan
from moezoo.adapters.upcycle.export import export
from moezoo.adapters.verify import verify
from moezoo.cli import main
from moezoo.cost import cost
from moezoo.errors import ConfigError, TensorMismatch
from moezoo.models import resizing
from tests.conversion.dense import FAMILIES, SIZES, dense_t5, ids

TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
OWN: dict[str, tuple[str, ...]] = {"encoder": TABLES[:1], "decoder": TABLES[1:], "both": TABLES}


def own_tables(path: Path, family: str = "t5", names: tuple[str, ...] = TABLES) -> Path:
    """A dense T5 with tables of its own, as transformers saves it."""
    dense_t5(path, family)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
    for seed, name in enumerate(names):
        drawn = torch.randn(61, 16, generator=torch.Generator().manual_seed(seed))
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(drawn)
    model.save_pretrained(path)
    assert set(names) <= set(stored(path))
    return path


def stored(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in found)


def rewritten(path: Path, **tensors: Tensor | None) -> None:
    """Change tensors of a file, names with "_" for "."; None takes one away."""
    whole = stored(path)
    for name, tensor in tensors.items():
        whole.pop(name, None)
        if tensor is not None:
            whole[name] = tensor.clone()
    save_file(whole, path / "model.safetensors", {"format": "pt"})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made = model(ids(), decoder_input_ids=ids(seed=1))
    return getattr(made, "logits", None) if hasattr(made, "logits") else made.last_hidden_state


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_tables_of_the_stacks_load_save_and_convert_like_transformers(
    family: str, own: str, tmp_path: Path
) -> None:
    source, up, back = (
        own_tables(tmp_path / "t5", family, OWN[own]),
        tmp_path / "up",
        tmp_path / "b",
    )
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    ours = moezoo.load(source)
    assert [f"{stack}.embed_tokens.weight" for stack in ours.config.own_embeddings] == list(
        OWN[own]
    )
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    total = cost(ours.config).parameters
    assert (
        total
        == sum(p.numel() for p in ours.parameters())
        == sum(map(torch.numel, stored(source).values()))
    )
    moezoo.save(ours, tmp_path / "saved")
    assert same(stored(tmp_path / "saved"), stored(source))
    report = moezoo.upcycle(source, up, num_experts=4)
    assert report.plan.config.own_embeddings == ours.config.own_embeddings
    sparse = moezoo.load(up, capacity="dropless")
    torch.testing.assert_close(logits(sparse), logits(theirs), rtol=1e-4, atol=1e-4)
    found = verify(up, source)
    assert found.passed, found.line
    moezoo.downcycle(up, back)
    assert same(stored(back), stored(source))
    live = moezoo.upcycle(theirs, num_experts=4)
    assert torch.equal(logits(live), logits(sparse))
    assert torch.equal(logits(moezoo.downcycle(live)), logits(ours))


def test_a_spoilt_table_of_a_stack_is_found_by_its_bytes(tmp_path: Path) -> None:
    source = own_tables(tmp_path / "t5")
    moezoo.upcycle(source, tmp_path / "up", num_experts=4)
    table = stored(tmp_path / "up")[TABLES[1]]
    table[7, 3] += 1e-3
    rewritten(tmp_path / "up", **{TABLES[1]: table})
    found = verify(tmp_path / "up", source, levels=[1, 2])
    assert not found.passed
    assert TABLES[1] in found.line


@pytest.mark.parametrize("verb", ["grow", "shrink", "export", "merge"])
def test_every_verb_keeps_the_tables_of_the_stacks(verb: str, tmp_path: Path) -> None:
    source, up, out = own_tables(tmp_path / "t5"), tmp_path / "up", tmp_path / "out"
    moezoo.upcycle(source, up, num_experts=4)
    words = {
        "grow": ["grow", up, out],
        "shrink": ["shrink", up, out, "--experts", "2"],
        "export": ["export", up, out, "--layout", "moezoo"],
        "merge": ["merge", source, source, "--out", out],
    }[verb]
    assert main([str(word) for word in words]) == 0
    for name in ("shared.weight", *TABLES):
        assert torch.equal(stored(out)[name], stored(source)[name])
    found = logits(moezoo.load(out, capacity="dropless"))
    torch.testing.assert_close(found, logits(moezoo.load(source)), rtol=1e-4, atol=1e-4)


def test_an_encoders_own_table_is_used_and_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.T5EncoderModel(transformers.T5Config(**SIZES)).eval()
    theirs.encoder.embed_tokens.weight = nn.Parameter(torch.randn(61, 16))
    theirs.save_pretrained(tmp_path / "t5")
    ours = moezoo.load(tmp_path / "t5")
    with torch.no_grad():
        expected = theirs(ids()).last_hidden_state
        torch.testing.assert_close(ours(ids()).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    moezoo.upcycle(tmp_path / "t5", tmp_path / "up", num_experts=2)
    assert verify(tmp_path / "up", tmp_path / "t5").passed
    moezoo.downcycle(tmp_path / "up", tmp_path / "back")
    assert same(stored(tmp_path / "back"), stored(tmp_path / "t5"))


@pytest.mark.parametrize("names", [TABLES[:1], TABLES, (*TABLES, "lm_head.weight")])
def test_equal_aliases_come_back_and_are_counted(names: tuple[str, ...], tmp_path: Path) -> None:
    source, up, back = dense_t5(tmp_path / "t5"), tmp_path / "up", tmp_path / "back"
    rewritten(source, **dict.fromkeys(names, stored(source)["shared.weight"]))
    assert moezoo.load(source).config == moezoo.load(dense_t5(tmp_path / "plain")).config
    moezoo.upcycle(source, up, num_experts=4)
    assert not set(names) & set(stored(up))
    found = verify(up, source)
    assert found.passed
    assert f"{len(names)} of the source left out: repeats shared.weight" in found.line
    moezoo.downcycle(up, back)
    assert same(stored(back), stored(source))
    export(up, tmp_path / "half", dtype="bfloat16")
    assert set(moezoo.downcycle(tmp_path / "half")) == set(stored(source))


STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
HEADS = ("lm_head.weight", "decoder.lm_head.weight")
# What stands in a file besides, or instead of, shared.weight and lm_head.weight.
ODD: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "a stray": ("t5", (STRAY,), ()),
    "an encoder's table alone": ("t5", TABLES[:1], ("shared.weight",)),
    "a decoder's table alone": ("t5_v1_1", TABLES[1:], ("shared.weight",)),
    "both tables alone, and a stray": ("t5", (*TABLES, STRAY), ("shared.weight",)),
    "the tied head by both its names": ("t5", HEADS, ()),
    "the tied head by its old name": ("t5", HEADS[1:], ()),
    "a head by its old name": ("t5_v1_1", HEADS[1:], HEADS[:1]),
}


@pytest.mark.parametrize("case", ODD)
def test_the_very_tensors_of_a_source_come_back(case: str, tmp_path: Path) -> None:
    family, added, gone = ODD[case]
    source, up, back = dense_t5(tmp_path / "t5", family), tmp_path / "up", tmp_path / "back"
    whole = stored(source)
    table = dict.fromkeys(added, whole[gone[0] if gone else "shared.weight"])
    stray = {STRAY: torch.randn(32, 2)} if STRAY in added else {}
    rewritten(source, **{**table, **stray, **dict.fromkeys(gone)})
    moezoo.upcycle(source, up, num_experts=4)
    assert STRAY not in stored(up)
    found = verify(up, source)
    assert found.passed, found.line
    assert main(["grow", str(up), str(tmp_path / "more")]) == 0
    for number, path in enumerate((up, tmp_path / "more")):
        moezoo.downcycle(path, tmp_path / f"{back}-{number}")
        assert same(stored(tmp_path / f"{back}-{number}"), stored(source))
        assert same(moezoo.downcycle(path), stored(source))
    again = moezoo.load(f"{back}-0").state_dict()
    assert same(again, moezoo.load(source).state_dict())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("aliases", {"../x": "shared.weight"}),
        ("renamed", {"shared.weight": "../x"}),
        ("strays", {STRAY: {"dtype": "F32", "shape": [2], "base64": "AAAA"}}),
        ("strays", {"../x": {"dtype": "F32", "shape": [0], "base64": ""}}),
        ("strays", [1]),
    ],
)
def test_provenance_that_names_other_tensors_is_refused(
    field: str, value: Any, tmp_path: Path
) -> None:
    moezoo.upcycle(dense_t5(tmp_path / "t5"), tmp_path / "up", num_experts=4)
    config = json.loads((tmp_path / "up/config.json").read_text())
    config["moezoo_provenance"][field] = value
    (tmp_path / "up/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"moezoo_provenance.{field}"):
        moezoo.downcycle(tmp_path / "up")


def test_one_table_stands_for_shared_and_two_that_differ_need_a_head(tmp_path: Path) -> None:
    source = own_tables(tmp_path / "t5")
    rewritten(source, **{"shared.weight": None})
    with pytest.raises(TensorMismatch, match="neither shared.weight nor a head"):
        moezoo.load(source)
    rewritten(source, **{TABLES[0]: None})
    ours = moezoo.load(source)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    moezoo.upcycle(source, tmp_path / "up", num_experts=4)
    moezoo.downcycle(tmp_path / "up", tmp_path / "back")
    assert same(stored(tmp_path / "back"), stored(source))


def test_two_heads_that_differ_are_refused_and_equal_ones_are_one(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "t5", "t5_v1_1")
    head = stored(source)["lm_head.weight"]
    rewritten(source, **{"decoder.lm_head.weight": head})
    moezoo.upcycle(source, tmp_path / "up", num_experts=4)
    assert verify(tmp_path / "up", source).passed
    moezoo.downcycle(tmp_path / "up", tmp_path / "back")
    assert same(stored(tmp_path / "back"), stored(source))
    rewritten(source, **{"decoder.lm_head.weight": head + 1})
    with pytest.raises(TensorMismatch, match="same parameter"):
        moezoo.load(source)


@pytest.mark.parametrize("rows", [40, 100])
@pytest.mark.parametrize("own", [(), TABLES])
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_a_vocabulary_is_resized_on_disk_as_in_memory(
    family: str, own: tuple[str, ...], rows: int, tmp_path: Path
) -> None:
    source, up, out = own_tables(tmp_path / "t5", family, own), tmp_path / "up", tmp_path / "out"
    moezoo.upcycle(source, up, num_experts=4)
    assert main(["export", str(up), str(out), "--vocab-size", str(rows)]) == 0
    ours = moezoo.load(out)
    live = moezoo.resize_embeddings(moezoo.load(up), rows)
    assert ours.config.vocab_size == live.config.vocab_size == rows
    expected = live.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    found = verify(out, source)
    assert found.passed, found.line
    table = stored(out)["shared.weight"]
    table[-1, -1] += 1e-3
    rewritten(out, **{"shared.weight": table})
    assert not verify(out, source, levels=[2]).passed


def test_a_vocabulary_is_resized_in_another_dtype_too(tmp_path: Path) -> None:
    source, up = own_tables(tmp_path / "t5"), tmp_path / "up"
    moezoo.upcycle(source, up, num_experts=4)
    export(up, tmp_path / "out", dtype="bfloat16", vocab_size=99)
    found = verify(tmp_path / "out", source)
    assert found.passed, found.line
    live = moezoo.resize_embeddings(moezoo.load(up).bfloat16(), 99)
    assert torch.equal(stored(tmp_path / "out")["shared.weight"], live.shared.weight)


@pytest.mark.parametrize(
    "steps",
    [
        [(None, 99), (None, 120)],
        [(None, 99), (None, 80), (None, 130)],
        [(None, 40), (None, 61)],
        [(None, 99), ("bfloat16", None), (None, 50), (None, 70)],
    ],
)
def test_models_resized_again_and_again_verify(
    steps: list[tuple[str | None, int | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resizing, "BLOCK_BYTES", 16 * 4 * 7)  # several blocks, the last one short
    source, path = own_tables(tmp_path / "t5", "t5_v1_1"), tmp_path / "up"
    moezoo.upcycle(source, path, num_experts=4)
    for number, (dtype, rows) in enumerate(steps):
        export(path, tmp_path / str(number), dtype=dtype, vocab_size=rows)
        path = tmp_path / str(number)
    found = verify(path, source, levels=[1, 2, 3, 4])
    assert found.passed, found.line
    for name in ("shared.weight", "lm_head.weight", *TABLES):
        table = stored(path)[name]
        table[-1, -1] += 1
        rewritten(path, **{name: table})
        assert not verify(path, source, levels=[2]).passed
        table[-1, -1] -= 1
        rewritten(path, **{name: table})


@pytest.mark.parametrize("rows", ["0", "1", "-3"])
def test_a_vocabulary_without_its_special_ids_is_refused_and_nothing_written(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_t5(tmp_path / "t5")
    assert main(["export", str(source), str(tmp_path / "out"), "--vocab-size", rows]) == 2
    assert ("eos_token_id" if rows == "1" else "vocab_size") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_tensor_of_a_file_is_a_parameter_or_left_out_for_a_reason(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "t5")
    rewritten(source, **{STRAY: torch.ones(32, 2), TABLES[0]: stored(source)["shared.weight"]})
    with open_checkpoint(source) as checkpoint:
        used = {part.name for parts in checkpoint.tensors.values() for part in parts}
        assert used | set(checkpoint.left_out) == set(checkpoint.source.tensors)
        assert checkpoint.left_out[STRAY] == "never meant anything"
    moezoo.upcycle(source, tmp_path / "up", num_experts=4)
    line = verify(tmp_path / "up", source, levels=[1]).line
    assert "2 of the source left out: never meant anything, repeats shared.weight" in line


@pytest.mark.parametrize("problem", ["lost", "taken twice"])
def test_a_tensor_of_the_source_that_the_plan_forgets_fails_the_first_level(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense_t5(tmp_path / "t5")
    rewritten(source, **{TABLES[0]: stored(source)["shared.weight"]})
    moezoo.upcycle(source, tmp_path / "up", num_experts=4)
    assert verify(tmp_path / "up", source, levels=[1]).passed

    def forgetful(*arguments: Any, **options: Any) -> Plan:
        plan = make_plan(*arguments, **options)
        if problem == "lost":
            return replace(plan, left_out={})
        return replace(plan, left_out={**plan.left_out, "shared.weight": "twice"})

    monkeypatch.setattr(verification, "make_plan", forgetful)
    found = verify(tmp_path / "up", source, levels=[1])
    assert not found.passed
    assert f"{problem} {TABLES[0] if problem == 'lost' else 'shared.weight'}" in found.line


@pytest.mark.parametrize("alias", [(), TABLES[:1]])
def test_copies_that_switchs_layout_wants_do_not_come_back_and_aliases_do(
    alias: tuple[str, ...], tmp_path: Path
) -> None:
    source, up = tmp_path / "t5", tmp_path / "up"
    # Tables of whole pages, which are written another way than small ones.
    dense_t5(source, "t5_v1_1", feed_forward_proj="relu", vocab_size=1024, d_model=64)
    rewritten(source, **dict.fromkeys(alias, stored(source)["shared.weight"]))
    report = moezoo.upcycle(source, up, num_experts=4)
    found = stored(up)
    assert all(torch.equal(found[name], found["shared.weight"]) for name in TABLES)
    assert report.plan.parameters == sum(p.numel() for p in moezoo.load(up).parameters())
    verified = verify(up, source)
    assert verified.passed, verified.line
    assert main(["grow", str(up), str(tmp_path / "more")]) == 0
    assert (
        main(["export", str(tmp_path / "more"), str(tmp_path / "ours"), "--layout", "moezoo"]) == 0
    )
    for number, path in enumerate((up, tmp_path / "more", tmp_path / "ours")):
        moezoo.downcycle(path, tmp_path / f"back-{number}")
        assert same(stored(tmp_path / f"back-{number}"), stored(source))
    found[TABLES[1]][5, 5] += 1
    rewritten(up, **{TABLES[1]: found[TABLES[1]]})
    assert not verify(up, source, levels=[1]).passed  # it is a table of its own now
    assert f"bytes: {TABLES[1]} differs" in verify(up, source, levels=[2]).line
