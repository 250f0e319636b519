"""Tables of tokens, and heads, that are written with another number of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from moezoo.adapters.formats import Source, TensorInfo
from moezoo.adapters.formats.base import DTYPE_BITS
from moezoo.adapters.names import HEAD, SHARED, TABLES
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.rewrite import Output

if TYPE_CHECKING:
    from torch import Tensor

Step = tuple[str | None, int | None]  # another dtype ("BF16"), then another number of rows
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

    row = mean_row(_Table(source, info, kept).blocks()).to(torch_dtype(info.dtype))
    return tensor_bytes(row.expand(rows - kept, -1).contiguous())


def same_table(
    source: Source, info: TensorInfo, made: Source, name: str, steps: Iterable[Step]
) -> bool:
    """Whether the table `name` of `made` is what the steps, one after the other, make of the
    source's: every byte compared.
    """
    from moezoo.adapters.formats.base import tensor_bytes

    table = _Table(source, info, info.shape[0])
    for step in steps:
        table = table.after(step)
    written = made.info(name)
    if (written.dtype, written.shape[0]) != (table.dtype, table.rows):
        return False
    chunks = made.chunks(name, table.block_rows * written.nbytes // max(table.rows, 1))
    pairs = zip(table.blocks(), chunks, strict=True)
    return all(tensor_bytes(block) == memoryview(chunk) for block, chunk in pairs)


@dataclass(frozen=True)
class _Table:
    """A table that was never written: the first rows of one on disk, through some dtypes, and new
    rows after them.

    kept: rows of the source; casts: dtypes that they went through ("BF16"); added: how many rows of
    a kind, and the row (D,).
    """

    source: Source
    info: TensorInfo
    kept: int
    casts: tuple[str, ...] = ()
    added: tuple[tuple[int, Tensor], ...] = ()

    @property
    def dtype(self) -> str:
        return self.casts[-1] if self.casts else self.info.dtype

    @property
    def rows(self) -> int:
        return self.kept + sum(count for count, _ in self.added)

    @property
    def block_rows(self) -> int:
        from moezoo.models.resizing import block_rows

        return block_rows(math.prod(self.info.shape[1:]) * DTYPE_BITS[self.dtype] // 8)

    def after(self, step: Step) -> _Table:
        """The table in another dtype, then with another number of rows."""
        from moezoo.adapters.formats.base import torch_dtype
        from moezoo.adapters.upcycle.drawing import cast
        from moezoo.models.resizing import mean_row

        dtype, rows = step
        made = self
        if dtype is not None and dtype != self.dtype:
            added = tuple((n, cast(row, dtype, self.info.name)) for n, row in self.added)
            made = replace(self, casts=(*self.casts, dtype), added=added)
        if rows is None or rows == made.rows:
            return made
        if rows > made.rows:
            row = mean_row(made.blocks()).to(torch_dtype(made.dtype))
            return replace(made, added=(*made.added, (rows - made.rows, row)))
        left, added = rows - min(rows, made.kept), ()
        for count, row in made.added:
            added += ((min(count, left), row),)
            left -= min(count, left)
        return replace(made, kept=min(rows, made.kept), added=added)

    def blocks(self) -> Iterator[Tensor]:
        """All rows, as many at a time as `moezoo.resize_embeddings` reads."""
        import torch

        size = self.block_rows
        waiting: Tensor | None = None
        for part in chain(self._kept_rows(size), self._added_rows(size)):
            waiting = part if waiting is None else torch.cat([waiting, part])
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if waiting is not None and len(waiting):
            yield waiting

    def _kept_rows(self, size: int) -> Iterator[Tensor]:
        import torch

        from moezoo.adapters.formats.base import torch_dtype
        from moezoo.adapters.upcycle.drawing import cast

        left = self.kept
        row_bytes = self.info.nbytes // max(self.info.shape[0], 1)
        for chunk in self.source.chunks(self.info.name, size * row_bytes):
            if not left:
                return
            flat = torch.frombuffer(bytearray(chunk), dtype=torch_dtype(self.info.dtype))
            rows = flat.view(-1, *self.info.shape[1:])[:left]
            left -= len(rows)
            for dtype in self.casts:
                rows = cast(rows, dtype, self.info.name)
            yield rows

    def _added_rows(self, size: int) -> Iterator[Tensor]:
        for count, row in self.added:
            for start in range(0, count, size):
                yield row.expand(min(size, count - start), -1)


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
