"""One product equals `mm` whatever library computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moezoo.ops import products
from moezoo.ops.products import (
    LIMITS,
    Limits,
    Prepared,
    batched_outer,
    batched_product,
    outer_product,
    product,
    shared_rows,
    steady_product,
)


@pytest.fixture(params=[*LIMITS, "unknown"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Every processor's choices, on weights of any size."""
    found = LIMITS.get(request.param, Limits())
    monkeypatch.setattr(products, "limits", lambda: found)
    monkeypatch.setattr(products, "_SMALL_WEIGHT", 0)
    return found


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 9, 33])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (8, 64), (1, 1), (7, 3)])
@pytest.mark.parametrize("relu", [False, True])
def test_it_equals_mm_in_every_layout(
    rows: int, sizes: tuple[int, int], relu: bool, processor: Limits
) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs, outputs = sizes
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    expected = torch.mm(x, weight.t())
    expected = expected.relu() if relu else expected
    layouts: list[Tensor] = [
        weight,
        weight.t().contiguous().t(),
        torch.stack([weight] * 2, 2)[..., 0],
    ]
    for matrix in layouts:
        for training in (False, True):
            found = product(x, matrix, relu=relu, training=training)
            torch.testing.assert_close(found, expected)
            assert found.is_contiguous()
        if not relu:
            fixed, total = Prepared(matrix, rows), torch.ones(rows, outputs)
            torch.testing.assert_close(fixed(x, torch.empty(rows, outputs)), expected)
            torch.testing.assert_close(fixed(x), expected)
            fixed.add_to(total, x)
            torch.testing.assert_close(total, 1.0 + expected)
    torch.testing.assert_close(
        product(x[:, :1].expand(rows, inputs), weight)[:1],
        (x[:1, :1].expand(-1, inputs) @ weight.t()),
    )


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_outer_product_is_rounded_once(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn(rows, 80, generator=generator).to(dtype)[:, 40:]  # as the half of a gate's rows
    b = torch.randn(rows, 60, generator=generator).to(dtype)[:, ::2]
    out = torch.full((40, 30), float("nan"), dtype=dtype)
    assert outer_product(a, b, out=out) is out
    exact = a.double().t() @ b.double()
    rounding = torch.finfo(dtype).eps * 2.0 ** (torch.frexp(exact).exponent - 2)
    sums = 4 * rows * torch.finfo(torch.float64 if dtype.itemsize == 8 else torch.float32).eps
    slack = sums * (a.double().abs().t() @ b.double().abs())
    assert ((out.double() - exact).abs() <= rounding + slack).all()


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (1, 1), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_batch_equals_its_products(
    rows: int, sizes: tuple[int, int], dtype: torch.dtype, processor: Limits
) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs, outputs = sizes
    x = torch.randn(3, rows, inputs, generator=generator).to(dtype)
    stack = torch.randn(7, outputs, inputs, generator=generator).to(dtype)
    turned = stack.transpose(1, 2).contiguous().transpose(1, 2)
    for matrices in (stack[1:4], stack[1::2], turned[1:4], turned[::3]):
        out = torch.full((3, rows, outputs), float("nan"), dtype=dtype)
        batched_product(x, matrices, out=out)
        torch.testing.assert_close(out, x @ matrices.transpose(1, 2))
        y = torch.randn(3, rows, outputs, generator=generator).to(dtype)
        for place in (torch.empty_like(stack)[1:4], torch.empty_like(turned)[::3]):
            batched_outer(y, x, out=place)
            torch.testing.assert_close(place, y.transpose(1, 2) @ x)


def test_experts_share_a_product_where_a_library_computes_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = torch.empty(4, 3, 2)
        assert 0 < shared_rows(many, training=True) < shared_rows(many, training=False)
        torch.set_num_threads(1)
        assert shared_rows(many, training=False) == 4
    finally:
        torch.set_num_threads(threads)
    for half in (many.half(), many.bfloat16()):
        assert shared_rows(half, training=False) == 0
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert shared_rows(many, training=False) == 0


@pytest.mark.parametrize(("threads", "outputs", "pieces"), [(1, 6, 2), (2, 8, 2), (3, 8, 4),
                                                            (16, 48, 16), (16, 6, 2)])  # fmt: skip
def test_every_thread_has_a_piece_of_a_weight_for_one_row(
    threads: int, outputs: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, x = torch.randn(outputs, 5), torch.randn(1, 5)
    cut = products._pieces(weight)
    assert len(cut) == pieces
    torch.testing.assert_close(products._by_pieces(x, cut), x @ weight.t())


def test_without_onednn_the_values_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_kind", lambda *_: "onednn")
    x, weight = torch.randn(9, 16), torch.randn(24, 16)
    found = product(x, weight, relu=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(product(x, weight, relu=True), found)


@pytest.mark.parametrize(
    ("vendor", "rows", "kind"),
    [("AuthenticAMD", 1, "pieces"), ("AuthenticAMD", 4, "weight first"),
     ("AuthenticAMD", 64, "onednn"), ("GenuineIntel", 3, "mm"),
     ("GenuineIntel", 4, "onednn"), ("GenuineIntel", 64, "mm"), ("other", 4, "mm")],
)  # fmt: skip
def test_the_processor_decides(
    vendor: str, rows: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "limits", lambda: LIMITS.get(vendor, Limits()))
    weight = torch.zeros(3072, 768)
    assert products._kind(rows, weight, training=False) == kind
    small = torch.zeros(8, 768)
    assert products._kind(rows, small, training=False) == "mm"


def test_in_training_few_numbers_of_rows_are_compiled() -> None:
    compiled = {len(products._rounded(torch.empty(rows, 1))) for rows in range(32, 4097)}
    assert len(compiled) <= 8 * 7 + 1
    for rows in (32, 33, 100, 129, 1000, 1024):
        assert rows <= len(products._rounded(torch.empty(rows, 1))) <= rows * 9 / 8


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [33, 50, 100, 130])
def test_rows_beside_a_stretch_change_nothing_in_training(
    rows: int, relu: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "limits", lambda: LIMITS["AuthenticAMD"])
    beside = torch.full((200, 48), float("nan"))
    weight = torch.randn(48, 1000).t() if transposed else torch.randn(1000, 48)
    for start in (0, 3, 200 - rows):  # with more rows in memory after them, and with none
        x = beside.clone()[start : start + rows]
        x.normal_()
        found = product(x, weight, relu=relu, training=True)
        expected = x @ weight.t()
        torch.testing.assert_close(found, expected.relu() if relu else expected)
        assert found.shape == (rows, 1000) and found.is_contiguous()


@pytest.mark.parametrize("experts", [1, 3, 8, 64])
def test_scores_of_a_row_do_not_depend_on_the_rows_beside_it(experts: int) -> None:
    x, weight = torch.randn(40, 48), torch.randn(experts, 48)
    whole = steady_product(x, weight)
    torch.testing.assert_close(whole, x @ weight.t())
    for rows in (1, 2, 3, 5, 16, 33):
        assert torch.equal(steady_product(x[:rows], weight), whole[:rows])
    assert steady_product(x[:0], weight).shape == (0, experts)


def test_a_large_result_is_made_in_stretches_of_the_same_bits() -> None:
    experts = 2048
    step = products._STRETCH // experts
    x, weight = torch.randn(4 * step + 1, 96), torch.randn(experts, 96)
    whole = steady_product(x, weight)
    assert whole.shape == (4 * step + 1, experts) and whole.is_contiguous()
    assert products.in_huge_pages(whole.numel() * 4, whole.device)
    torch.testing.assert_close(whole, x @ weight.t())
    for rows in (slice(0, 2), slice(step - 1, step + 3), slice(-1, None), slice(7, 2 * step)):
        assert torch.equal(steady_product(x[rows], weight), whole[rows])


@pytest.mark.parametrize("kind", ["training", "evaluation", "scores"])
def test_ever_new_numbers_of_rows_are_given_few_to_onednn_and_keep_their_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "limits", lambda: LIMITS["AuthenticAMD"])
    monkeypatch.setattr(products, "_SMALL_WEIGHT", 0)
    monkeypatch.setattr(products, "_met", set())
    compiled, onednn = set(), products._onednn

    def counted(x: Tensor, weight: Tensor, relu: bool) -> Tensor:
        compiled.add(x.shape)
        return onednn(x, weight, relu)

    monkeypatch.setattr(products, "_onednn", counted)
    x, weight = torch.randn(1024, 8), torch.randn(24, 8)
    whole = steady_product(x, weight)
    for rows in range(32, 1025):
        found = (
            steady_product(x[:rows], weight)
            if kind == "scores"
            else product(x[:rows], weight, training=kind == "training")
        )
        assert torch.equal(found, whole[:rows]) and found.is_contiguous()
    assert len(compiled) <= products._EXACT * (kind == "evaluation") + 8 * 5 + 1


def test_a_row_is_a_column_of_one_stride_however_it_lies(processor: Limits) -> None:
    """MKL is thirty times slower for a column whose next one would begin elsewhere."""
    wide = torch.randn(3, 16)
    weight = torch.randn(24, 16)
    for row in (wide[1:2], wide[0].as_strided((1, 16), (1, 1)), wide.t().contiguous().t()[2:]):
        assert products._column(row, 2).stride() == (0, 1, 16)
        assert torch.equal(products._column(row, 2)[1, :, 0], row[0])
        torch.testing.assert_close(product(row, weight), row @ weight.t())
