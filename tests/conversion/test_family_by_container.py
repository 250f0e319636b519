"""Which family reads from which container: every pair that docs/conversion.md names."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import moezoo
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.flax import arrays, read_msgpack
from moezoo.adapters.verify import verify
from tests.conversion.dense import SIZES, ids, own_head
from tests.conversion.test_containers import CONTAINERS, nested, packed, t5x_arrays

GATED: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "T5 v1.0": ("T5ForConditionalGeneration", {}),
    "T5 v1.1": ("T5ForConditionalGeneration", GATED),
    "UL2": ("T5ForConditionalGeneration", GATED | {"feed_forward_proj": "gated-silu"}),
    "mT5": ("MT5ForConditionalGeneration", GATED),
    "ByT5": ("T5ForConditionalGeneration", GATED | {"num_layers": 3, "num_decoder_layers": 1}),
    "UMT5": ("UMT5ForConditionalGeneration", GATED),
    "encoder": ("T5EncoderModel", {}),
    "UMT5 encoder": ("UMT5EncoderModel", GATED),
}
KINDS = ("torch", "flax", "t5x", "orbax ocdbt", "orbax zarr3", "gguf F32")
REAL = Path(__file__).parents[3] / "shared" / "real" / "t5x_tiny"


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the family, as transformers saves it."""
    name, options = FAMILIES[request.param]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SIZES, **options}))
    if hasattr(model, "lm_head") and "tie_word_embeddings" in options:
        own_head(model)
    path = tmp_path_factory.mktemp("dense") / "t5"
    model.save_pretrained(path)
    return path


def outputs(path: Path) -> Tensor:
    model = moezoo.load(path)
    with torch.no_grad():
        whole = hasattr(model, "decoder")
        made = model(ids(), decoder_input_ids=ids(seed=1)) if whole else model(ids())
    found = made.last_hidden_state if made.logits is None else made.logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_reads_from_every_container_of_the_page(
    kind: str, dense: Path, tmp_path: Path
) -> None:
    out, weights = tmp_path / "other", load_file(dense / "model.safetensors")
    out.mkdir()
    CONTAINERS[kind][0](weights, out)
    (out / "config.json").write_bytes((dense / "config.json").read_bytes())
    with open_source(out) as source:
        assert source.kind == kind.split()[0] and set(source.tensors) == set(weights)
        assert all(torch.equal(source.tensor(name), weights[name]) for name in weights)
    assert torch.equal(outputs(out), outputs(dense))


def taken_back(source: Path, tmp_path: Path) -> dict[str, Tensor]:
    """The tensors of a t5x checkpoint, after it was upcycled, verified and taken back."""
    moezoo.upcycle(source, tmp_path / "up", num_experts=4)
    found = verify(tmp_path / "up", source)
    assert found.passed, found.line
    moezoo.downcycle(tmp_path / "up", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    with open_source(source) as opened:
        assert set(back) == set(opened.tensors)
        assert all(torch.equal(back[name], opened.tensor(name)) for name in back)
    cls = transformers.T5ForConditionalGeneration
    theirs, report = cls.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids(), decoder_input_ids=ids(seed=1)).logits
    torch.testing.assert_close(outputs(source), expected, rtol=1e-4, atol=1e-4)
    return back


def raw_arrays(file: Path) -> dict[str, Tensor]:
    """The model's arrays by flaxformer's names, as they stand in the file."""
    target = read_msgpack(file)["optimizer"]["target"]
    return {
        ".".join(keys): torch.frombuffer(bytearray(a.read()), dtype=torch.float32).view(a.shape)
        for keys, a in arrays(target, file)
    }


def test_googles_own_t5x_checkpoint_reads_upcycles_verifies_and_goes_back(tmp_path: Path) -> None:
    file = REAL / "test_t5_tiny.checkpoint_0.xz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    source = tmp_path / "t5x"
    source.mkdir()
    (source / "checkpoint").write_bytes(lzma.decompress(file.read_bytes()))
    back, raw = taken_back(source, tmp_path), raw_arrays(source / "checkpoint")
    expected = {name: t5x_arrays({name: tensor}) for name, tensor in back.items()}
    assert sum(map(len, expected.values())) == len(raw)
    for pair in expected.values():
        ((theirs, array),) = pair.items()
        assert torch.equal(array, raw[theirs]), theirs
    config = moezoo.load(source).config
    assert (config.feed_forward_proj, config.tie_word_embeddings) == ("gated-gelu", False)


def test_a_t5x_checkpoint_of_one_file_and_no_config_goes_back(tmp_path: Path) -> None:
    cls = transformers.T5ForConditionalGeneration
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SIZES, **GATED}))
    own_head(model)
    model.save_pretrained(tmp_path / "t5")
    source, weights = tmp_path / "t5x", load_file(tmp_path / "t5/model.safetensors")
    source.mkdir()
    state = {"step": 0, "param_states": nested({"decoder.logits_dense.kernel.m": torch.ones(1)})}
    target = nested(dict(t5x_arrays(weights)))
    content = {"version": 3, "optimizer": {"state": state, "target": target}}
    (source / "checkpoint").write_bytes(packed(content))
    back = taken_back(source, tmp_path)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
