"""orbax checkpoints written by tensorstore alone, in the layouts that orbax 0.4 to 0.12 write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts
import torch

_ZARR3_SHARDS = {
    "codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}],
    "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
}
Arrays = Mapping[str, torch.Tensor]


def write_item(
    folder: Path, arrays: Arrays, *, packed: bool = True, zarr3: bool = False, tree: bool = True
) -> None:
    """An item folder: arrays by their dotted names, in a database or in folders of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "ocdbt.process_0"
    for name, tensor in arrays.items():
        base = {"driver": "file", "path": f"{part if packed else folder}/"}
        place = {**base, "path": f"{folder}/{name}/"}
        if packed:
            place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        write_array(place, tensor, zarr3=zarr3)
    if packed:
        merge(part, folder)
    if tree:
        write_tree(folder, arrays, zarr3=zarr3, packed=packed)


def merge(part: Path, folder: Path) -> None:
    """Make the database of one process that of the checkpoint; the values stay where they are."""
    context, bases = ts.Context(), ({"driver": "file", "path": f"{p}/"} for p in (part, folder))
    specs = ({"driver": "ocdbt", "base": base} for base in bases)
    found, whole = (ts.KvStore.open(spec, context=context).result() for spec in specs)
    with ts.Transaction(atomic=True) as transaction:
        found.experimental_copy_range_to(whole.with_transaction(transaction)).result()


def write_array(place: dict[str, Any], tensor: torch.Tensor, *, zarr3: bool) -> None:
    """One array in chunks of about half its size along every axis."""
    shape = list(tensor.shape)
    chunks = [math.ceil(n / 2) for n in shape]
    name = str(tensor.dtype).removeprefix("torch.")
    meta: dict[str, Any] = {"shape": shape}
    if zarr3:
        sharding = {"chunk_shape": chunks, **_ZARR3_SHARDS}
        meta |= {
            "data_type": name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
    else:
        dtype = {"float32": "<f4", "float16": "<f2", "int64": "<i8"}.get(name, name)
        zstd = {"id": "zstd", "level": 1}
        meta |= {"dtype": dtype, "chunks": chunks, "compressor": zstd, "fill_value": None}
    driver = "zarr3" if zarr3 else "zarr"
    spec = {"driver": driver, "kvstore": place, "metadata": meta, "create": True}
    spec["store_data_equal_to_fill_value"] = True
    array = ts.open(spec).result()
    words = tensor.contiguous().view(torch.int16) if name == "bfloat16" else tensor.contiguous()
    array.write(words.numpy().view(array.dtype.numpy_dtype)).result()


def write_tree(folder: Path, arrays: Arrays, *, zarr3: bool, packed: bool) -> None:
    """The file `_METADATA`, with an empty node and a text beside the arrays."""

    def leaf(name: str, kind: str, skipped: bool) -> tuple[str, Any]:
        keys = name.split(".")
        value = {"value_type": kind, "skip_deserialize": skipped}
        named = [{"key": key, "key_type": 2} for key in keys]
        return str(tuple(keys)), {"key_metadata": named, "value_metadata": value}

    leaves = [leaf(name, "jax.Array", False) for name in arrays]
    leaves += [leaf("state.empty", "Dict", True), leaf("state.run", "string", False)]
    tree = {"tree_metadata": dict(leaves), "use_ocdbt": packed, "use_zarr3": zarr3}
    tree["store_array_data_equal_to_fill_value"] = True
    (folder / "_METADATA").write_text(json.dumps(tree))
