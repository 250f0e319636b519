"""Every malformed checkpoint is refused by a typed error that names the culprit."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moezoo
from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.safetensors import read_header
from moezoo.errors import (
    CheckpointError,
    ConfigError,
    CorruptFile,
    IndexFileError,
    MoezooError,
    NonFiniteWeights,
    TensorMismatch,
    UnsafeCheckpoint,
)
from tests.conversion.dense import dense_t5

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WI = "encoder.block.1.layer.1.DenseReluDense.wi.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_t5(tmp_path_factory.mktemp("sound") / "t5")


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    target = tmp_path / "broken"
    target.mkdir()
    for name in (WEIGHTS, "config.json"):
        (target / name).write_bytes((sound / name).read_bytes())
    return target


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(
    path: Path, header: str | bytes, data: bytes = b"", length: int | None = None
) -> None:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        header, data = header_of(directory / WEIGHTS)
        change(header)
        write_raw(directory / WEIGHTS, json.dumps(header), data)

    return apply


def entry(**fields: Any) -> Callable[[Path], None]:
    return edited(lambda header: header[WI].update(fields))


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / WEIGHTS).write_bytes(content) and None


def header_text(text: str, length: int | None = None) -> Callable[[Path], None]:
    return lambda directory: write_raw(directory / WEIGHTS, text, length=length)


def truncate(share: float) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        os.truncate(directory / WEIGHTS, int((directory / WEIGHTS).stat().st_size * share))

    return apply


def replaced_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        make(directory / WEIGHTS)

    return apply


def trailing(directory: Path) -> None:
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"extra")


def overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    same = [n for n in names if header[n]["shape"] == header[names[1]]["shape"]]
    header[same[0]]["data_offsets"] = header[same[1]]["data_offsets"]


CONTAINERS: dict[str, tuple[Callable[[Path], None], type[MoezooError], str]] = {
    "zero bytes": (raw(b""), CorruptFile, "too short"),
    "seven bytes": (raw(b"1234567"), CorruptFile, "too short"),
    "truncated in the data": (truncate(0.6), CorruptFile, "truncated"),
    "truncated in the header": (truncate(0.01), CorruptFile, "impossible"),
    "absurd header length": (header_text("{}", 2**63), CorruptFile, "impossible"),
    "header length zero": (header_text("", 0), CorruptFile, "impossible"),
    "header that is no JSON": (header_text("{{{{"), CorruptFile, "not valid JSON"),
    "header that is a list": (header_text("[1, 2]"), CorruptFile, "not a JSON object"),
    "header nested deeply": (header_text("[" * 100_000), CorruptFile, "nested too deeply"),
    "header of huge numbers": (header_text('{"a":' + "9" * 5000 + "}"), CorruptFile, "too long"),
    "header that is not UTF-8": (
        lambda d: write_raw(d / WEIGHTS, b'{"\xff\xfe": 1}'), CorruptFile, "not UTF-8"),
    "metadata of numbers": (
        edited(lambda h: h.update(__metadata__={"a": 1})), CorruptFile, "__metadata__"),
    "duplicate tensor": (
        header_text('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
                    '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        CorruptFile, "'a' appears twice"),
    "name that is no Unicode": (
        header_text('{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        CorruptFile, "Unicode"),
    "unknown dtype": (entry(dtype="F33"), CorruptFile, "unknown dtype"),
    "dtype that is a number": (entry(dtype=5), CorruptFile, "unknown dtype"),
    "negative size": (entry(shape=[-1, 16]), CorruptFile, "not a list of sizes"),
    "fractional size": (entry(shape=[1.5, 16]), CorruptFile, "not a list of sizes"),
    "boolean size": (entry(shape=[True, 16]), CorruptFile, "not a list of sizes"),
    "shape that overflows": (entry(shape=[2**40, 2**40]), CorruptFile, "offsets disagree"),
    "shape of a thousand axes": (entry(shape=[1] * 1000), CorruptFile, "not a list of sizes"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), CorruptFile, "not two positions"),
    "reversed offsets": (entry(data_offsets=[1536, 0]), CorruptFile, "offsets disagree"),
    "offsets past the end": (
        entry(data_offsets=[10**9, 10**9 + 1536]), CorruptFile, "hole"),
    "overlapping tensors": (edited(overlap), CorruptFile, "overlaps|hole"),
    "unknown field": (entry(extra=1), CorruptFile, "exactly dtype"),
    "bytes after the end": (trailing, CorruptFile, "bytes follow"),
    "an HTML page": (raw(b"<!DOCTYPE html><html>"), CorruptFile, "HTML page"),
    "a git-lfs pointer": (
        raw(b"version https://git-lfs.github.com/spec/v1\noid"), CorruptFile, "git-lfs pointer"),
    "a directory": (replaced_by(Path.mkdir), CorruptFile, "a directory"),
    "a FIFO": (replaced_by(os.mkfifo), CorruptFile, "a FIFO"),
    "a symlink loop": (
        replaced_by(lambda p: p.symlink_to(p.name)), CheckpointError, "symbolic links"),
    "a dangling symlink": (
        replaced_by(lambda p: p.symlink_to("nowhere")), CheckpointError, "symlink to nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_malformed_container_is_refused_by_name(kind: str, broken: Path) -> None:
    spoil, error, message = CONTAINERS[kind]
    spoil(broken)
    for opened in (open_checkpoint, moezoo.load):
        with pytest.raises(error, match=message) as caught:
            opened(broken)
        assert WEIGHTS in str(caught.value) and "\n" not in str(caught.value)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})

    return apply


CONTENTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(WI), "wi.weight"),
    "renamed": (lambda t: t.update({WI.replace("wi", "wx"): t.pop(WI)}), "wx"),
    "extra": (lambda t: t.update({"encoder.block.9.layer.0.layer_norm.weight": torch.ones(16)}),
              "block.9"),
    "foreign": (lambda t: t.update({"bert.pooler": torch.ones(1)}), "bert.pooler"),
    "transposed": (lambda t: t.update({WI: t[WI].T.contiguous()}), "shape"),
    "narrow": (lambda t: t.update({WI: t[WI][:, :8].contiguous()}), "shape"),
    "integers": (lambda t: t.update({WI: t[WI].to(torch.int32)}), "I32|floating"),
    "complex": (lambda t: t.update({WI: t[WI].to(torch.complex64)}), "C64|floating"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTENTS)
def test_wrong_tensors_are_refused_by_key(kind: str, broken: Path) -> None:
    change, message = CONTENTS[kind]
    with_tensors(change)(broken)
    for opened in (open_checkpoint, moezoo.load):
        with pytest.raises(TensorMismatch, match=message):
            opened(broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_by_key(value: float, broken: Path) -> None:
    with_tensors(lambda tensors: tensors[WI].fill_(value))(broken)
    with pytest.raises(NonFiniteWeights, match="wi.weight"):
        moezoo.load(broken)


CONFIGS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not"),
    "a list": ("[]", "object"),
    "empty": ({}, "model_type"),
    "no size": ({"d_model": ...}, "d_model"),
    "text for a size": ({"d_model": "wide"}, "d_model"),
    "a negative size": ({"d_ff": -1}, "d_ff"),
    "an absurd size": ({"d_ff": 10**9}, "d_ff"),
    "a billion layers": ({"num_layers": 10**9}, "num_layers"),
    "a wrong kind": ({"model_type": "bert"}, "model_type"),
    "a kind that is a number": ({"model_type": 7}, "model_type"),
    "an unknown activation": ({"dense_act_fn": "swiglu9"}, "dense_act_fn"),
    "fewer layers than there are": ({"num_layers": 1, "num_decoder_layers": 1}, "block.1"),
    "more layers than there are": ({"num_layers": 3}, "block.2"),
    "other heads": ({"num_heads": 4}, "shape|SelfAttention"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_config_is_refused_by_field(kind: str, broken: Path) -> None:
    content, message = CONFIGS[kind]
    file = broken / "config.json"
    if isinstance(content, dict):
        values = json.loads(file.read_text()) if content else {}
        values.update(content)
        content = json.dumps({k: v for k, v in values.items() if v is not ...})
    file.write_text(content)
    for opened in (open_checkpoint, moezoo.load):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            opened(broken)


@pytest.fixture
def sharded(broken: Path) -> Path:
    tensors = load_file(broken / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, broken / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (broken / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (broken / WEIGHTS).unlink()
    return broken


def index_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return apply


def duplicated_key(directory: Path) -> None:
    text = (directory / INDEX).read_text()
    (directory / INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{WI}": "a.safetensors", ')
    )


def everywhere(name: object) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update({WI: name})


INDEXES: dict[str, tuple[Callable[[Path], None], str]] = {
    "not JSON": (lambda d: (d / INDEX).write_text("{") and None, "not valid JSON"),
    "without a map": (index_with(lambda i: i.pop("weight_map")), "no weight_map"),
    "a map that is a list": (index_with(lambda i: i.update(weight_map=[])), "no weight_map"),
    "a shard that is missing": (lambda d: (d / "b.safetensors").unlink(), "b.safetensors"),
    "a key listed twice": (duplicated_key, "appears twice"),
    "a key in the wrong shard": (
        index_with(lambda i: i["weight_map"].update({"shared.weight": "a.safetensors"})),
        "disagree: the shard lacks"),
    "an absolute path": (index_with(everywhere("/etc/passwd")), "unsafe path"),
    "a path upwards": (index_with(everywhere("../a.safetensors")), "unsafe path"),
    "a path in a folder": (index_with(everywhere("x/a.safetensors")), "unsafe path"),
    "a path of two dots": (index_with(everywhere("..")), "unsafe path"),
    "a number for a path": (index_with(everywhere(3)), "not a string"),
    "a tensor that is not listed": (
        index_with(lambda i: i["weight_map"].pop(WI)), "also holds|disagree"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_a_wrong_index_is_refused_by_name(kind: str, sharded: Path) -> None:
    spoil, message = INDEXES[kind]
    spoil(sharded)
    for opened in (open_checkpoint, moezoo.load):
        with pytest.raises(IndexFileError, match=message) as caught:
            opened(sharded)
        assert INDEX in str(caught.value)


def test_sound_shards_load_and_so_does_a_hub_cache_of_symlinks(sharded: Path, sound: Path) -> None:
    cache = sharded.parent / "snapshot"
    cache.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        (sharded.parent / f"blob{number}").write_bytes(file.read_bytes())
        (cache / file.name).symlink_to(f"../blob{number}")
    expected = moezoo.load(sound).state_dict()
    for directory in (sharded, cache):
        found = moezoo.load(directory).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class Payload:
    """Writes a file when a careless reader unpickles it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.witness,))


def test_code_in_a_bin_never_runs(broken: Path) -> None:
    witness = broken / "ran"
    (broken / WEIGHTS).unlink()
    torch.save({"shared.weight": Payload(witness)}, broken / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="asks for code"):
        moezoo.load(broken)
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(witness)))
    with pytest.raises(CheckpointError):
        moezoo.load(broken)
    assert not witness.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_sound_bin_loads_and_a_cut_one_is_refused(
    zipped: bool, sound: Path, tmp_path: Path
) -> None:
    tensors = load_file(sound / WEIGHTS)
    file = tmp_path / "pytorch_model.bin"
    (tmp_path / "config.json").write_bytes((sound / "config.json").read_bytes())
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    expected = moezoo.load(sound).state_dict()
    found = moezoo.load(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CorruptFile, match="pytorch_model.bin"):
        moezoo.load(tmp_path)


@given(data=st.data())
def test_any_mutation_of_a_header_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = data.draw(st.lists(st.text(max_size=4), max_size=4))
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
        | st.sampled_from(["F32", "BF16", "BOOL"]),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=3),
        max_leaves=8,
    )  # fmt: skip
    sound = st.just({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = {name: data.draw(values | sound) for name in names}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(text) - 1))
        text = text[:position] + data.draw(st.binary(max_size=3)) + text[position + 1 :]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    write_raw(path, text, data.draw(st.binary(max_size=8)))
    try:
        tensors, _ = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert sum(info.nbytes for info in tensors.values()) + 8 + len(text) == path.stat().st_size


def test_a_missing_path_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path, message in (
        (tmp_path / "nowhere", "no such file"),
        (tmp_path / "notes.txt", "not a checkpoint container"),
        (tmp_path, "no weights here"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_source(path)
