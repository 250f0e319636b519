"""Hash layers: a fixed table from token id to expert."""

from __future__ import annotations

import pytest
import torch

from moezoo import routers
from moezoo.errors import ConfigError
from moezoo.records import Tokens
from tests.routers.batches import VOCABULARY, WIDTH, batch, make, pairs


def test_hash_looks_the_expert_up() -> None:
    tokens, router = batch(20, padded=True), make("hash")
    assert tokens.ids is not None
    assert tokens.real is not None
    table = router.table.tolist()
    wanted = [(t, table[i]) for t, i in enumerate(tokens.ids.tolist()) if tokens.real[t]]
    assert pairs(router(tokens)) == wanted


def test_balanced_table_gives_every_expert_equally_many_ids() -> None:
    assert torch.bincount(make("hash").table).tolist() == [VOCABULARY // 4] * 4


def test_frequency_table_balances_tokens_rather_than_ids() -> None:
    frequencies = [1000.0 / (rank + 1) for rank in range(VOCABULARY)]
    table = make("hash", 3, table="frequency", frequencies=frequencies).table
    load = torch.zeros(3).index_add_(0, table, torch.tensor(frequencies))
    assert (load.max() / load.mean()).item() < 1.05
    assert len(set(torch.bincount(table).tolist())) > 1


def test_table_is_drawn_from_its_own_seed() -> None:
    sizes = {"d_model": WIDTH, "num_experts": 4, "vocab_size": VOCABULARY}
    tables = []
    for global_seed, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(global_seed)
        tables.append(
            routers.build({"name": "hash", "table": "random", "seed": seed}, **sizes).table
        )
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_padding_may_hold_any_id() -> None:
    real = torch.tensor([True, False])
    tokens = Tokens(torch.randn(2, WIDTH), torch.tensor([3, -100]), real)
    assert len(pairs(make("hash")(tokens))) == 1


def test_hash_has_no_parameters_and_saves_its_table() -> None:
    router = make("hash")
    assert list(router.parameters()) == []
    assert set(router.state_dict()) == {"table"}


def test_missing_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs token_ids"):
        make("hash")(Tokens(torch.randn(2, WIDTH)))


def test_frequency_table_without_frequencies_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the frequency of every id"):
        make("hash", table="frequency")
