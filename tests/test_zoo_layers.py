"""Every product of the zoo as a whole layer: empty input, one token, padding, any rank, groups."""

from __future__ import annotations

import pytest
import torch

import moezoo
from moezoo.product_table import Product, policy_products

WORKING = [product for product in policy_products() if not product.refused]


@pytest.mark.parametrize("product", WORKING, ids=lambda p: f"{p.router}-{p.partner}")
@pytest.mark.parametrize("group", ["batch", "sequence", 7])
def test_a_layer_takes_any_shape_and_leaves_padding_zero(
    product: Product, group: str | int
) -> None:
    torch.manual_seed(0)
    needed = moezoo.capacity.registry.get(product.partner).required_group
    layer = moezoo.SparseMLP(
        8,
        8,
        4,
        router=product.router,
        capacity=product.partner,
        vocab_size=16,
        group=needed or group,
    )
    for shape in ((0, 5), (2, 0), (1, 1), (3,), (2, 3, 4)):
        x = torch.randn(*shape, 8, requires_grad=True)
        with moezoo.record(layer) as tape:
            y = layer(x, token_ids=torch.randint(16, shape))
        y.sum().backward()
        assert y.shape == x.shape
        assert torch.isfinite(x.grad).all()
        assert tape.stats()["moe"].tokens == x[..., 0].numel()
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    y = layer(torch.randn(2, 5, 8), mask=mask, token_ids=torch.zeros(2, 5).long())
    assert y[~mask].abs().sum() == 0


@pytest.mark.parametrize("product", WORKING, ids=lambda p: f"{p.router}-{p.partner}")
def test_enough_capacity_equals_dropless_bit_for_bit(product: Product) -> None:
    if product.router == "soft":
        assert product.partner == "dropless"
        return
    outputs = []
    roomy = {"name": product.partner} | (
        {} if product.partner in ("dropless", "switch") else {"limit": 24}
    )
    if product.partner == "switch":
        roomy["factor"] = 4.0
    for policy in (roomy, "dropless"):
        torch.manual_seed(0)
        layer = moezoo.SparseMLP(
            8, 8, 4, router=product.router, capacity=policy, vocab_size=16, group="sequence"
        ).train()
        torch.manual_seed(1)
        outputs.append(layer(torch.randn(1, 24, 8), token_ids=torch.randint(16, (1, 24))))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("product", WORKING, ids=lambda p: f"{p.router}-{p.partner}")
def test_one_token_is_computed_alone_and_as_in_a_group_of_padding(product: Product) -> None:
    torch.manual_seed(0)
    own = moezoo.capacity.build(
        product.partner
    ).required_group  # then a token is a sequence by itself
    layer = moezoo.SparseMLP(
        8, 8, 4, router=product.router, capacity=product.partner, vocab_size=16, group=own or 64
    ).eval()
    x, ids = torch.randn(64, 8), torch.randint(16, (64,))
    mask = torch.arange(64) == 0
    rows: list[int] = []
    layer.moe.router.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0].x)))
    with torch.no_grad():
        alone = layer(x[:1], token_ids=ids[:1])
        among = layer(x, mask=mask, token_ids=ids)[:1]
    torch.testing.assert_close(alone, among)
    assert rows == [1, 64]
