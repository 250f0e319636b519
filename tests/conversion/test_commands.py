"""The verbs of conversion, as commands, on every container and every family."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moezoo
from moezoo.adapters import plan as adapters_plan
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.plan import Plan, make_plan
from moezoo.adapters.upcycle import convert
from moezoo.cli import main
from tests.conversion.dense import SIZES, dense_t5, ids, own_head, relative
from tests.conversion.test_containers import (
    CONTAINERS,
    nested,
    packed,
    t5x_name,
    write_zarr,
    written,
)
from tests.conversion.test_foreign import flax_shards

WIDE = {"d_model": 32, "d_ff": 64}  # Q8_0 packs rows in blocks of 32


CARRIED = ["generation_config.json", "spiece.model"]  # of those that the tests have


def sharded(dense: Path, out: Path) -> Path:
    model = transformers.T5ForConditionalGeneration.from_pretrained(dense)
    model.save_pretrained(out, max_shard_size="9KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    return out


def bin_shards(dense: Path, out: Path) -> Path:
    out.mkdir()
    weights = load_file(dense / "model.safetensors")
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, out / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (out / "config.json").write_bytes((dense / "config.json").read_bytes())
    return out


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "safetensors": lambda dense, out: dense,
    "safetensors shards": sharded,
    "torch shards": bin_shards,
    "flax shards": flax_shards,
    **{
        kind: lambda dense, out, kind=kind: written(kind, dense, out)  # type: ignore[misc]
        for kind in CONTAINERS
    },
}


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint as dtype, shape and bytes."""
    with open_source(path) as source:
        return {
            name: (info.dtype, info.shape, bytes(tensor_bytes(source.tensor(name))))
            for name, info in source.tensors.items()
        }


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_every_verb_works_on_every_container(
    layout: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = LAYOUTS[layout](dense_t5(tmp_path / "dense", family, **WIDE), tmp_path / "source")
    up, back, ours, more, near = (tmp_path / n for n in ("up", "back", "ours", "more", "near"))
    assert run("plan", source, "--experts", 4, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["carried"] == [n for n in CARRIED if (source / n).exists()]
    written = sum(group["bytes_written"] for group in plan["groups"])
    assert plan["bytes_written"] == written
    # In float16 transformers' Switch would overflow where the dense model does not.
    fits = family == "t5" and layout != "gguf F16"
    assert plan["container"] == layout.split()[0] and plan["expressible"] == fits
    assert run("upcycle", source, up, "--experts", 4) == 0
    assert run("verify", up, "--against", source) == 0
    found = stored(up)
    assert sum(len(content) for _, _, content in found.values()) == plan["bytes_written"]
    assert run("downcycle", up, back) == 0
    assert stored(back) == stored(source)
    assert run("export", up, ours, "--layout", "moezoo") == 0
    assert json.loads((ours / "config.json").read_text())["model_type"] == "moezoo"
    if fits:
        assert run("export", ours, near, "--layout", "huggingface") == 0
        assert stored(near) == found
        assert (near / "config.json").read_text().count('"switch_transformers"') == 1
    else:
        assert run("export", ours, near, "--layout", "huggingface") == 2
        reason = "no gated experts" if family != "t5" else "has the plain top-1 router only"
        assert reason in capsys.readouterr().err
    assert run("grow", up, more, "--factor", 2) == 0
    assert relative(logits(more), logits(up)) <= 1e-5
    assert run("downcycle", more, tmp_path / "again") == 0
    assert stored(tmp_path / "again") == stored(source)


def logits(path: Path) -> torch.Tensor:
    model = moezoo.load(path, dtype=torch.float32, capacity="dropless")
    with torch.no_grad():
        return model(ids(), decoder_input_ids=ids(seed=1)).logits


def switch_as_t5x(sparse: Path, out: Path) -> Path:
    """A Switch model as t5x holds it: all experts of a matrix in one array (E, d, F)."""
    out.mkdir()
    weights = load_file(sparse / "model.safetensors")
    flat: dict[str, Any] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in weights.items():
        stack, _, block, *_ = f"{name}....".split(".")
        start = f"{stack}.layers_{block}.mlp"
        if ".experts." in name:
            key = f"{start}.expert.{name.split('.')[-2]}.kernel"
            stacks.setdefault(key, []).append(tensor.T.contiguous())
        elif ".router." in name:
            flat[f"{start}.router.router_weights.w.kernel"] = tensor.T.contiguous()
        else:
            theirs = t5x_name(name.replace(".mlp.", ".DenseReluDense."))
            turned = tensor.dim() == 2 and theirs != "token_embedder.embedding"
            array = tensor.T.contiguous() if turned else tensor
            flat[theirs] = array
            if theirs.endswith("kernel"):
                flat[theirs] = f"PLACEHOLDER://target.{theirs}"
                write_zarr(array, out / f"target.{theirs}")
    flat |= {key: torch.stack(parts) for key, parts in stacks.items()}
    (out / "checkpoint").write_bytes(packed({"optimizer": {"target": nested(flat)}}))
    (out / "config.json").write_bytes((sparse / "config.json").read_bytes())
    return out


def test_a_sparse_t5x_checkpoint_is_exported_grown_and_taken_back(tmp_path: Path) -> None:
    dense = dense_t5(tmp_path / "dense")
    assert run("upcycle", dense, tmp_path / "up", "--experts", 4) == 0
    source = switch_as_t5x(tmp_path / "up", tmp_path / "t5x")
    assert run("export", source, tmp_path / "out") == 0
    assert stored(tmp_path / "out") == stored(tmp_path / "up")
    assert run("grow", source, tmp_path / "more") == 0
    assert relative(logits(tmp_path / "more"), logits(tmp_path / "up")) <= 1e-5
    assert run("downcycle", source, tmp_path / "back") == 0
    assert stored(tmp_path / "back") == stored(dense)


BYT5 = {"num_layers": 3, "num_decoder_layers": 1}  # more encoder than decoder layers
GATED = {"feed_forward_proj": "gated-gelu"}
UNTIED = {"tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5 v1.0": ("T5ForConditionalGeneration", {}),
    "t5 v1.1": ("T5ForConditionalGeneration", GATED | UNTIED),
    "ul2": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-silu"} | UNTIED),
    "mt5": ("MT5ForConditionalGeneration", GATED | UNTIED),
    "umt5": ("UMT5ForConditionalGeneration", GATED | UNTIED),
    "byt5": ("T5ForConditionalGeneration", GATED | BYT5 | UNTIED),
    "t5 encoder": ("T5EncoderModel", {}),
    "v1.1 encoder": ("T5EncoderModel", GATED),
    "umt5 encoder": ("UMT5EncoderModel", GATED),
    "t5 without a head": ("T5Model", {}),
}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        encoder = not hasattr(model, "decoder")
        made = model(ids()) if encoder else model(ids(), decoder_input_ids=ids(seed=1))
    logits = getattr(made, "logits", None)
    return made.last_hidden_state if logits is None else logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_ends_at_the_same_bytes_and_the_same_model(
    family: str, tmp_path: Path
) -> None:
    kind, options = FAMILIES[family]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**(SIZES | options))).eval()
    if "tie_word_embeddings" in options:
        own_head(model)
    model.save_pretrained(tmp_path / "source")
    source, up, back = tmp_path / "source", tmp_path / "up", tmp_path / "back"
    assert run("upcycle", source, up, "--experts", 8, "--layers", "all", "--verify") == 0
    sparse = moezoo.load(up, capacity="dropless")
    assert relative(outputs(sparse), outputs(model)) <= 1e-4
    assert run("downcycle", up, back) == 0
    assert stored(back) == stored(source)
    again = cls.from_pretrained(back).eval()
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("layout", ["safetensors", "safetensors shards", "torch", "torch shards"])
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_what_transformers_loads_is_what_is_loaded_here(
    layout: str, family: str, tmp_path: Path
) -> None:
    source = LAYOUTS[layout](dense_t5(tmp_path / "dense", family), tmp_path / "source")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    ours = moezoo.load(source)
    assert relative(outputs(ours), outputs(theirs)) <= 1e-6
    state = theirs.state_dict()
    with open_source(source) as opened:
        assert ("lm_head.weight" in opened.tensors) == (family != "t5")
        assert all(torch.equal(opened.tensor(name), state[name]) for name in opened.tensors)


def test_a_hub_cache_of_symlinks_is_converted_with_its_tokenizer(tmp_path: Path) -> None:
    plain = dense_t5(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--t5/snapshots/abc", tmp_path / "models--t5/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert run("upcycle", snapshot, tmp_path / "up", "--experts", 2) == 0
    assert run("upcycle", plain, tmp_path / "same", "--experts", 2) == 0
    assert stored(tmp_path / "up") == stored(tmp_path / "same")
    assert run("verify", tmp_path / "up", "--against", snapshot, "--levels", "1,2") == 0
    tokenizer = tmp_path / "up/spiece.model"
    assert not tokenizer.is_symlink()
    assert tokenizer.read_bytes() == (plain / "spiece.model").read_bytes()
    moezoo.downcycle(tmp_path / "up", tmp_path / "same", overwrite=True)
    assert stored(tmp_path / "same") == stored(plain)


_IMPORTED = """
import sys
from moezoo.cli import main
assert main(sys.argv[1:]) == 0
print(*sorted(sys.modules))
"""


def test_an_upcycling_imports_no_reader_but_its_own(tmp_path: Path) -> None:
    source = dense_t5(tmp_path / "dense")
    words = ["upcycle", str(source), str(tmp_path / "up"), "--experts", "4"]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED, *words], capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.splitlines()[-1].split())
    inside = "moezoo.adapters.formats."
    readers = {name.removeprefix(inside) for name in modules if name.startswith(inside)}
    assert readers == {"base", "detect", "files", "index", "safetensors"}
    assert not modules & {"torch", "numpy", "concurrent.futures", "logging", "importlib.metadata"}


def test_an_upcycling_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def counted(*given: Any, **options: Any) -> Plan:
        plans.append(make_plan(*given, **options))
        return plans[-1]

    for module in (adapters_plan, convert):
        monkeypatch.setattr(module, "make_plan", counted)
    assert run("upcycle", dense_t5(tmp_path / "dense"), tmp_path / "up", "--experts", 4) == 0
    assert len(plans) == 1


def test_an_upcycling_leaves_the_turns_of_threads_as_they_were(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    assert run("upcycle", dense_t5(tmp_path / "dense"), tmp_path / "up", "--experts", 4) == 0
    assert sys.getswitchinterval() == before


def test_a_single_file_of_a_larger_model_becomes_an_encoder(tmp_path: Path) -> None:
    dense = dense_t5(tmp_path / "dense")
    start = "text_encoders.t5xxl.transformer."
    weights = load_file(dense / "model.safetensors")
    kept = {start + n: t for n, t in weights.items() if not n.startswith("decoder")}
    bundle = tmp_path / "bundle.safetensors"
    save_file(kept | {"model.diffusion_model.weight": torch.zeros(3)}, bundle)
    assert run("upcycle", bundle, tmp_path / "up", "--experts", 2, "--verify") == 0
    assert run("downcycle", tmp_path / "up", tmp_path / "back") == 0
    assert stored(tmp_path / "back") == {
        name.removeprefix(start): entry
        for name, entry in stored(bundle).items()
        if name.startswith(start)
    }
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "back")
    assert encoder.config.num_layers == SIZES["num_layers"]


@pytest.mark.parametrize("model_type", ["mixtral", "llama", "gpt2"])
@pytest.mark.parametrize("verb", ["finetune", "evaluate"])
def test_a_decoder_is_sent_to_trainer_before_anybody_asks_for_pairs(
    verb: str, model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    more = [str(tmp_path / "out"), "--steps", "1"] if verb == "finetune" else []
    assert main([verb, str(tmp_path / "model"), *more]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for word in (
        "config.json",
        f"{verb} is for T5 and Switch",
        model_type,
        "Trainer",
        "07_upcycle",
    ):
        assert word in line
    assert "pairs" not in line
    assert not (tmp_path / "out").exists()
