"""Zero-computation experts beside real ones."""

from __future__ import annotations

import pytest
import torch

from moezoo.errors import ConfigError
from moezoo.experts import ModuleExperts, StackedExperts, ZeroExperts


def test_every_kind_computes_its_formula_on_its_rows() -> None:
    torch.manual_seed(0)
    container = ZeroExperts(4, 6, 6, zero=1, copy=1, constant=2)
    rows, counts = torch.randn(14, 4), torch.tensor([2, 1, 3, 2, 1, 4])
    out = container(rows, counts)
    assert torch.allclose(out[:3], container.experts(rows[:3], counts[:2]))
    assert out[3:6].abs().sum() == 0
    assert torch.equal(out[6:8], rows[6:8])
    for index, rows_of in enumerate((slice(8, 9), slice(9, 13))):
        mixed = (rows[rows_of] @ container.mixer[index].T).softmax(-1)
        wanted = mixed[:, :1] * rows[rows_of] + mixed[:, 1:] * container.value[index]
        assert torch.allclose(out[rows_of], wanted, atol=1e-6)
    assert out[13:].abs().sum() == 0


@pytest.mark.parametrize(
    ("num_experts", "kinds"),
    [(1, (1, 0, 0, 0)), (2, (1, 1, 0, 0)), (3, (1, 1, 1, 0)), (8, (5, 1, 1, 1))],
)
def test_one_of_each_kind_by_default_as_far_as_a_real_one_remains(
    num_experts: int, kinds: tuple[int, ...]
) -> None:
    container = ZeroExperts(4, 6, num_experts)
    assert (container.real, container.zero, container.copy, container.constant) == kinds


def test_real_experts_may_be_any_container() -> None:
    inner = ModuleExperts(4, 2, sizes=[3, 5])
    container = ZeroExperts(4, 6, 4, experts=inner, zero=1, copy=1, constant=0)
    assert container(torch.randn(6, 4), torch.tensor([2, 1, 1, 2])).shape == (6, 4)


def test_real_experts_that_do_not_fill_up_are_refused() -> None:
    inner = StackedExperts(4, 6, 3)
    with pytest.raises(ConfigError, match="do not fill up num_experts; expected 2, found 3"):
        ZeroExperts(4, 6, 4, experts=inner, zero=1, copy=1, constant=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"zero": 4}, "no real expert is left among 4"), ({"copy": -1}, "copy is a whole number")],
)
def test_impossible_numbers_are_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ZeroExperts(4, 6, 4, **options)
