"""orbax checkpoints of every layout give the same model; malformed ones are refused by name."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import moezoo
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.errors import CheckpointError, CorruptFile, MoezooError
from tests.conversion.dense import dense_t5, ids
from tests.conversion.orbax import write_item
from tests.conversion.test_commands import run, stored
from tests.conversion.test_containers import Weights, nested, packed, t5x_arrays

WI = "target.encoder.layers_0.mlp.wi.kernel"
LAYOUTS = {
    "ocdbt": {},
    "ocdbt of zarr 3": {"zarr3": True},
    "folders": {"packed": False},
    "folders of zarr 3": {"packed": False, "zarr3": True},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_t5(tmp_path_factory.mktemp("dense") / "t5")


@pytest.fixture(scope="module")
def sound(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An item of every layout, with its config.json."""
    folder = tmp_path_factory.mktemp("sound")
    for name, layout in LAYOUTS.items():
        write_item(folder / name, target(dense), **layout)
        shutil.copy(dense / "config.json", folder / name)
    return {name: folder / name for name in LAYOUTS}


def target(dense: Path) -> Weights:
    weights = t5x_arrays(load_file(dense / "model.safetensors"))
    state = {"state.step": torch.tensor(7)}
    return {f"target.{name}": array for name, array in weights.items()} | state


def holds(path: Path, expected: Weights) -> bool:
    with open_source(path) as source:
        assert source.kind == "orbax" and set(source.tensors) == set(expected)
        shapes = {name: info.shape for name, info in source.tensors.items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        return all(bytes(source.read(n)) == bytes(tensor_bytes(t)) for n, t in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_weights_of_the_model(
    layout: str, sound: dict[str, Path], dense: Path
) -> None:
    assert holds(sound[layout], load_file(dense / "model.safetensors"))
    assert holds(sound[layout] / "_METADATA", load_file(dense / "model.safetensors"))
    with torch.no_grad():
        found = moezoo.load(sound[layout])(ids(), decoder_input_ids=ids()).logits
        expected = moezoo.load(dense)(ids(), decoder_input_ids=ids()).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow_weights_keep_their_bits(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = dense_t5(tmp_path / "dense", dtype=dtype)
    write_item(tmp_path / "item", target(dense), **LAYOUTS[layout])
    assert holds(tmp_path / "item", load_file(dense / "model.safetensors"))


@pytest.mark.parametrize("root", ["params.", "params.params.", "state.params.", "mine.", ""])
def test_flax_names_are_found_below_any_training_state(root: str, tmp_path: Path) -> None:
    weights = load_file(dense_t5(tmp_path / "dense", "t5_v1_1") / "model.safetensors")
    arrays = {}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        table = stem == "shared" or "relative_attention_bias" in name
        ending = "weight" if "layer_norm" in name else "embedding" if table else "kernel"
        turned = tensor.T.contiguous() if ending == "kernel" else tensor
        arrays[f"{root}{stem}.{ending}"] = turned
    if root and root != "mine.":  # Adam's averages have the names of the weights
        arrays |= {f"opt_state.0.mu.{name}": torch.zeros(2, 2) for name in arrays}
    write_item(tmp_path / "item", arrays)
    assert holds(tmp_path / "item", weights)


@pytest.mark.parametrize(
    ("place", "config"),
    [
        ("default", "."),
        ("state", "state"),
        ("any", "."),
        ("7/default", "."),
        ("7/state", "7"),
        ("7/any", "7/any"),
    ],
)
def test_the_item_and_its_config_are_found_below_the_checkpoint(
    place: str, config: str, dense: Path, tmp_path: Path
) -> None:
    write_item(tmp_path / place, target(dense))
    values = json.loads((dense / "config.json").read_text()) | {"layer_norm_epsilon": 0.25}
    (tmp_path / config / "config.json").write_text(json.dumps(values))
    assert holds(tmp_path, load_file(dense / "model.safetensors"))
    assert moezoo.load(tmp_path).config.layer_norm_epsilon == 0.25


@pytest.mark.parametrize("packed_arrays", [True, False])
def test_older_checkpoints_name_their_arrays_in_messagepack(
    packed_arrays: bool, dense: Path, tmp_path: Path
) -> None:
    arrays = target(dense)
    small = {name: array for name, array in arrays.items() if array.dim() == 1}
    stores = {name: array for name, array in arrays.items() if name not in small}
    write_item(tmp_path, stores, packed=packed_arrays, tree=packed_arrays)
    flat = {name: f"PLACEHOLDER://{name}" for name in stores} | small
    (tmp_path / "checkpoint").write_bytes(packed(nested(flat)))
    if not packed_arrays:
        (tmp_path / "_METADATA").write_text("{}")
    assert holds(tmp_path, load_file(dense / "model.safetensors"))


def switch_arrays(sparse: Path) -> Weights:
    """A Switch model's weights as t5x has them: all experts of a matrix in one array (E, d, F)."""
    arrays: Weights = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in load_file(sparse / "model.safetensors").items():
        stack, _, block, *_ = f"{name}....".split(".")
        start = f"{stack}.layers_{block}.mlp"
        if ".experts." in name:
            key = f"{start}.expert.{name.split('.')[-2]}.kernel"
            stacks.setdefault(key, []).append(tensor.T)
        elif ".router." in name:
            arrays[f"{start}.router.router_weights.w.kernel"] = tensor.T.contiguous()
        else:
            arrays |= t5x_arrays({name.replace(".mlp.", ".DenseReluDense."): tensor})
    arrays |= {key: torch.stack(parts) for key, parts in stacks.items()}
    return {f"target.{name}": array for name, array in arrays.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_checkpoint_is_exported_and_taken_back(
    layout: str, dense: Path, tmp_path: Path
) -> None:
    assert run("upcycle", dense, tmp_path / "up", "--experts", 4) == 0
    source = tmp_path / "orbax"
    write_item(source, switch_arrays(tmp_path / "up"), **LAYOUTS[layout])
    shutil.copy(tmp_path / "up/config.json", source)
    assert run("export", source, tmp_path / "out") == 0
    assert stored(tmp_path / "out") == stored(tmp_path / "up")
    assert run("downcycle", source, tmp_path / "back") == 0
    assert stored(tmp_path / "back") == stored(dense)


def test_a_chunk_of_several_experts_is_unpacked_once_for_all_of_them(
    dense: Path, tmp_path: Path
) -> None:
    moezoo.upcycle(dense, tmp_path / "up", num_experts=4)
    write_item(tmp_path / "orbax", switch_arrays(tmp_path / "up"), packed=False)
    expected = load_file(tmp_path / "up/model.safetensors")
    start = "encoder.block.1.layer.1.mlp.experts.expert"
    with open_source(tmp_path / "orbax") as source:
        for expert in (0, 1):  # a chunk holds two
            for matrix in ("wi", "wo"):
                name = f"{start}_{expert}.{matrix}.weight"
                assert torch.equal(source.tensor(name), expected[name])
            lost("*.expert.*/[0-9]*")(tmp_path / "orbax")


def cut(pattern: str, share: float = 0.5) -> Callable[[Path], None]:
    def spoil(item: Path) -> None:
        for file in sorted(item.glob(pattern)):
            file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return spoil


def lost(pattern: str) -> Callable[[Path], None]:
    def spoil(item: Path) -> None:
        for file in list(item.glob(pattern)):
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    return spoil


def edited(file: str, **fields: Any) -> Callable[[Path], None]:
    def spoil(item: Path) -> None:
        path = item / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def codecs(*names: str) -> dict[str, Any]:
    return {"codecs": [{"name": name} for name in names]}


ZARRAY, ZARR3 = f"{WI}/.zarray", f"{WI}/zarr.json"
GRID = {"name": "regular", "configuration": {"chunk_shape": [2**39, 2**39]}}
SHARDS = {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 1]}}
MALFORMED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no manifest": ("ocdbt", lost("manifest.ocdbt"), r"manifest\.ocdbt: it is missing.*Download"),
    "an empty manifest": ("ocdbt", cut("manifest.ocdbt", 0), r"manifest\.ocdbt.*less than minimum"),
    "a cut manifest": ("ocdbt", cut("manifest.ocdbt"), r"manifest\.ocdbt.*Length in header"),
    "a cut tree": ("ocdbt", cut("d/*"), r"manifest\.ocdbt.*cannot be read.*Download"),
    "cut values": ("ocdbt", cut("ocdbt.process_0/d/*"), "cannot be read.*Download"),
    "lost values": ("ocdbt", lost("ocdbt.process_0/d"), "is lost, with.*Download"),
    "no tree": ("ocdbt", lost("_METADATA"), "neither _METADATA nor checkpoint"),
    "a cut _METADATA": ("ocdbt", cut("_METADATA"), "_METADATA: not valid JSON"),
    "no tree_metadata": ("ocdbt", edited("_METADATA", tree_metadata=[]), "no tree_metadata"),
    "a leaf of text": ("ocdbt", edited("_METADATA", tree_metadata={"a": "b"}), "'a' is malformed"),
    "a leaf without a name": (
        "ocdbt",
        edited("_METADATA", tree_metadata={"a": {"key_metadata": [1], "value_metadata": {}}}),
        "'a' has no name"),
    "no model": ("ocdbt", edited("_METADATA", tree_metadata={}), "no T5 in it.*0 other arrays"),
    "a lost array": ("folders", lost(WI), rf"{WI}: the array .* is missing.*Download"),
    "a lost chunk": ("folders", lost(f"{WI}/1.1"), rf"{WI}.*1\.1.*is missing.*Download"),
    "a lost shard": ("folders of zarr 3", lost(f"{WI}/c/1/1"), rf"{WI}.*is missing.*Download"),
    "a cut chunk": ("folders", cut(f"{WI}/0.1"), rf"{WI}.*Truncated Zstd"),
    "an empty chunk": ("folders", cut(f"{WI}/0.1", 0), rf"{WI}.*cannot be read"),
    "a cut shard": ("folders of zarr 3", cut(f"{WI}/c/0/0"), rf"{WI}.*cannot be read"),
    "a cut .zarray": ("folders", cut(ZARRAY), r"\.zarray: not valid JSON"),
    "a shape of text": ("folders", edited(ZARRAY, shape="wide"), "shape is not a list"),
    "an absurd shape": ("folders", edited(ZARRAY, shape=[2**39, 2**39]), "do not fit"),
    "absurd chunks": ("folders", edited(ZARRAY, chunks=[2**20, 2**20]), "larger than the array"),
    "too many chunks": ("folders", edited(ZARRAY, shape=[2**17, 1], chunks=[1, 1]), "more than"),
    "another dtype": ("folders", edited(ZARRAY, dtype="<U9"), "unknown dtype"),
    "another compressor": ("folders", edited(ZARRAY, compressor={"id": "blosc"}), "'blosc'"),
    "a compressor of no sense": (
        "folders", edited(ZARRAY, compressor={"id": "zstd", "level": "x"}), "cannot be read"),
    "another order": ("folders", edited(ZARRAY, order="F"), "column-major"),
    "a group": ("folders of zarr 3", edited(ZARR3, node_type="group"), "no array with a regular"),
    "an absurd grid": ("folders of zarr 3", edited(ZARR3, chunk_grid=GRID), "larger than the arr"),
    "another codec": ("folders of zarr 3", edited(ZARR3, **codecs("blosc")), "'blosc'"),
    "no codecs": ("folders of zarr 3", edited(ZARR3, codecs={}), "codecs is no list"),
    "shards of nothing": ("folders of zarr 3", edited(ZARR3, codecs=[SHARDS]), "codecs is no list"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_checkpoint_is_refused_by_file_or_array(
    kind: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    layout, spoil, message = MALFORMED[kind]
    item = shutil.copytree(sound[layout], tmp_path / "item")
    spoil(item)
    with pytest.raises(CheckpointError, match=message) as caught:
        moezoo.load(item)
    assert str(item) in str(caught.value)


def test_an_array_that_its_files_cannot_hold_is_refused_before_anything_is_allocated(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    item = shutil.copytree(sound["folders"], tmp_path / "item")
    edited(ZARRAY, shape=[2**20, 2**20], chunks=[2**20, 2**20])(item)
    with open_source(item) as source, pytest.raises(CorruptFile, match="claims more than its fil"):
        source.read("encoder.block.0.layer.1.DenseReluDense.wi.weight")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", "x" * 300])
def test_names_in_the_tree_lead_nowhere_else(
    name: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    item = shutil.copytree(sound["folders"], tmp_path / "item")
    tree = json.loads((item / "_METADATA").read_text())
    leaf = copy.deepcopy(next(iter(tree["tree_metadata"].values())))
    leaf["key_metadata"] = [{"key": "target"}, {"key": name}]
    tree["tree_metadata"]["more"] = leaf
    (item / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="unsafe path|is missing"):
        open_source(item)


def test_a_link_to_a_checkpoint_loads(
    sound: dict[str, Path], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "links").mkdir()
    monkeypatch.chdir(tmp_path / "links")
    for number, item in enumerate(sound.values()):
        Path(str(number)).symlink_to(item)
        assert holds(Path("../links") / str(number), load_file(dense / "model.safetensors"))


def test_several_checkpoints_and_unfinished_ones_are_refused(dense: Path, tmp_path: Path) -> None:
    write_item(tmp_path / "runs/x.orbax-checkpoint-tmp-3", target(dense), packed=False)
    with pytest.raises(CheckpointError, match="never finished"):
        open_source(tmp_path / "runs")
    write_item(tmp_path / "runs/other", target(dense), packed=False)
    with pytest.raises(CheckpointError, match="2 orbax checkpoints.*folder of one.*'other'"):
        open_source(tmp_path / "runs")


@pytest.fixture
def without_tensorstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    yield


@pytest.mark.usefixtures("without_tensorstore")
def test_without_the_extra_the_way_to_it_is_told(sound: dict[str, Path]) -> None:
    for item in sound.values():
        with pytest.raises(CheckpointError, match=r"tensorstore.*pip install '\.\[orbax\]'"):
            moezoo.load(item)


MUTATED = {"folders": ("_METADATA", ZARRAY), "folders of zarr 3": (ZARR3,)}
NAMES = [(layout, file) for layout, files in MUTATED.items() for file in files]
VALUES = st.sampled_from([None, -1, 0, 3, 2**40, 2**63, 0.5, "", "..", [], {}, [[]], [1, 2]])


@given(data=st.data())
def test_any_mutation_of_metadata_is_read_or_refused(
    data: st.DataObject, sound: dict[str, Path]
) -> None:
    layout, file = data.draw(st.sampled_from(NAMES))
    path = sound[layout] / file
    before = path.read_bytes()
    values = place = json.loads(before)
    for _ in range(data.draw(st.integers(0, 6))):
        inner = place[data.draw(st.sampled_from(list(place)))]
        if not isinstance(inner, dict) or not inner:
            break
        place = inner
    place[data.draw(st.sampled_from(list(place)))] = data.draw(VALUES)
    try:
        path.write_text(json.dumps(values))
        with open_source(sound[layout]) as source:
            source.read("encoder.block.0.layer.1.DenseReluDense.wi.weight")
    except MoezooError as error:
        assert str(sound[layout]) in str(error)
    finally:
        path.write_bytes(before)
