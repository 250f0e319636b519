"""What training over ranks promises, short enough to be run against every seeded bug of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moezoo.training.checkpoints import checkpoints, restore
from tests.parallel import test_training as full
from tests.parallel.ranks import Claims, started
from tests.parallel.runs import RECIPES, state, tensors

claims = Claims()
pytestmark = pytest.mark.dist
for claim in (
    full.six_steps_of_sharded_adafactor,
    full.a_nan_on_one_rank_is_one_of_the_step,
    full.a_nan_in_the_part_of_one_rank_is_one_of_the_step,
    full.dropout_is_another_one_on_every_rank_and_in_every_step,
    full.a_checkpoint_is_written_by_two,
    full.generation_of_other_lengths_is_that_of_one_process,
):
    claims.over(2)(claim)


def test_the_claims_hold_over_ranks(tmp_path: Path) -> None:
    full.prepare(tmp_path)
    wrong = {claim: text for claim, text in started(__name__, tmp_path, timeout=15).items() if text}
    assert not wrong, wrong
    found = state("alone", RECIPES["adafactor"])
    restore(found, checkpoints(tmp_path / "two")[-1], {"a": 1})
    whole, now = torch.load(tmp_path / "whole.pt", weights_only=True), tensors(found)
    assert now.keys() == whole.keys()
    assert all(torch.equal(now[name], whole[name]) for name in whole)
