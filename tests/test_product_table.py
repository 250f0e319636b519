"""The product table is true: what it says works, works, and what it refuses is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moezoo
from moezoo.errors import ConfigError
from moezoo.product_table import (
    Product,
    as_markdown,
    as_text,
    loss_products,
    policy_products,
    rewrite,
)

ZOO = Path(__file__).parent.parent / "docs" / "zoo.md"


def layer(product: Product, *, causal: bool = False) -> moezoo.SparseMLP:
    torch.manual_seed(0)
    return moezoo.SparseMLP(
        8, 8, 4, router=product.router, capacity=product.partner, vocab_size=16, causal=causal
    )


@pytest.mark.parametrize("product", policy_products(), ids=lambda p: f"{p.router}-{p.partner}")
def test_the_verdict_on_a_pair_is_what_the_layer_does(product: Product) -> None:
    if product.verdict == "refused":
        with pytest.raises(ConfigError) as caught:
            layer(product)
        assert str(product.refused) in str(caught.value)
        return
    x = torch.randn(2, 6, 8, requires_grad=True)
    y = layer(product).train()(x, token_ids=torch.randint(16, (2, 6)))
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    if product.verdict == "not causal":
        with pytest.raises(ConfigError, match="not causal, in a decoder"):
            layer(product, causal=True)


@pytest.mark.parametrize(
    "product",
    [product for product in policy_products() if product.verdict == "works"],
    ids=lambda p: f"{p.router}-{p.partner}",
)
@pytest.mark.parametrize("training", [True, False])
def test_a_pair_called_causal_never_looks_ahead(product: Product, training: bool) -> None:
    module = layer(product, causal=True).train(training)
    x, ids = torch.randn(1, 24, 8), torch.randint(16, (1, 24))
    changed, other_ids = x.clone(), ids.clone()
    changed[:, 12:], other_ids[:, 12:] = torch.randn(1, 12, 8), torch.randint(16, (1, 12))
    outputs = []
    for values, tokens in ((x, ids), (changed, other_ids)):
        torch.manual_seed(1)  # the same noise for both
        outputs.append(module(values, token_ids=tokens)[:, :12])
    assert torch.allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize("product", loss_products(), ids=lambda p: f"{p.router}-{p.partner}")
def test_the_verdict_on_a_loss_is_what_recording_does(product: Product) -> None:
    module = moezoo.SparseMLP(8, 8, 4, router=product.router, capacity="dropless", vocab_size=16)
    with moezoo.record(module) as tape:
        module(torch.randn(2, 6, 8), token_ids=torch.randint(16, (2, 6)))
    if product.refused:
        with pytest.raises(ConfigError) as caught:
            tape.loss({product.partner: 1.0})
        assert product.refused in str(caught.value)
    else:
        assert torch.isfinite(tape.loss({product.partner: 1.0}))


def test_docs_hold_the_current_table() -> None:
    hint = "run: python -m moezoo.product_table docs/zoo.md"
    assert ZOO.read_text().endswith(as_markdown()), hint


def test_rewriting_keeps_the_head_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "zoo.md"
    page.write_text("# Head\n\n## Old\n\nnothing\n")
    rewrite(page)
    assert page.read_text() == "# Head\n\n" + as_markdown()


def test_the_terminal_form_has_no_markup() -> None:
    assert "|" not in as_text()
    assert "`" not in as_text()
