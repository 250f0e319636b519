"""Tables of tokens, and heads, that are written with another number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from moezoo.adapters.formats import Source, TensorInfo
from moezoo.adapters.names import HEAD, SHARED, TABLES
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.rewrite import Output

if TYPE_CHECKING:
    from torch import Tensor

ROWS_OF_TOKENS = (SHARED, *TABLES.values(), HEAD)  # parameters with a row for each token


def resized_output(source: Source, info: TensorInfo, name: str, dtype: str, rows: int) -> Output:
    """A table with `rows` rows: the first ones as they are, new ones as their mean.

    Args:
        name, dtype: of what is written. Another dtype needs the table in memory.
    """
    plan = TensorPlan(name, dtype, (rows, *info.shape[1:]))
    if dtype != info.dtype:
        return Output(plan, make=partial(_converted, source, info, dtype, rows))
    return Output(plan, info, tail=partial(new_rows, source, info, rows, kept=info.shape[0]))


def new_rows(source: Source, info: TensorInfo, rows: int, *, kept: int) -> memoryview:
    """The bytes of what a table of `kept` rows lacks to have `rows`: their mean, again and again,
    in its own dtype; the same as `moezoo.resize_embeddings` gives.
    """
    from moezoo.adapters.formats.base import tensor_bytes, torch_dtype
    from moezoo.models.resizing import mean_row

    row = mean_row(_blocks(source, info, kept)).to(torch_dtype(info.dtype))
    return tensor_bytes(row.expand(rows - kept, -1).contiguous())


def same_table(source: Source, info: TensorInfo, made: Source, name: str) -> bool:
    """Whether the table `name` of `made` is that of the source but for its number of rows and its
    dtype: every byte compared.
    """
    from moezoo.adapters.formats.base import tensor_bytes
    from moezoo.adapters.upcycle.drawing import cast

    written = made.info(name)
    kept = min(written.shape[0], info.shape[0])
    size = kept * written.nbytes // max(written.shape[0], 1)
    if written.dtype == info.dtype:
        pairs = zip(_start(source, info.name, size), _start(made, name, size), strict=True)
        same = all(ours == theirs for ours, theirs in pairs)
    else:
        converted = tensor_bytes(cast(source.tensor(info.name), written.dtype, info.name))
        same = converted[:size] == memoryview(made.read(name))[:size]
    if not same or written.shape[0] == kept:
        return same
    expected = new_rows(made, written, written.shape[0], kept=kept)
    return memoryview(made.read(name))[size:] == expected


def _converted(source: Source, info: TensorInfo, dtype: str, rows: int) -> memoryview:
    import torch

    from moezoo.adapters.formats.base import tensor_bytes
    from moezoo.adapters.upcycle.drawing import cast
    from moezoo.models.resizing import block_rows, mean_row

    table = cast(source.tensor(info.name)[:rows], dtype, info.name)
    added = rows - table.shape[0]
    if added > 0:
        size = block_rows(table.shape[1] * table.element_size())
        row = mean_row(torch.split(table, size)).to(table.dtype)
        table = torch.cat([table, row.expand(added, -1)])
    return tensor_bytes(table)


def _blocks(source: Source, info: TensorInfo, kept: int) -> Iterator[Tensor]:
    """Rows of a table, some at a time."""
    import torch

    from moezoo.adapters.formats.base import torch_dtype
    from moezoo.models.resizing import block_rows

    row_bytes = info.nbytes // max(info.shape[0], 1)
    for chunk in source.chunks(info.name, block_rows(row_bytes) * row_bytes):
        rows = torch.frombuffer(bytearray(chunk), dtype=torch_dtype(info.dtype))
        block = rows.view(-1, *info.shape[1:])[:kept]
        kept -= block.shape[0]
        yield block


def _start(source: Source, name: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a tensor."""
    for chunk in source.chunks(name):
        if size <= 0:
            return
        yield bytes(chunk[:size])
        size -= len(chunk)
