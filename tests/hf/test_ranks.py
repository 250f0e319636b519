"""Trainer and Accelerate on two ranks do what they do on one, labels and padding unequal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.tiny import wrapped
from tests.parallel.ranks import Claims, Ranks, apart, started

pytest.importorskip("accelerate")
claims = Claims()
pytestmark = pytest.mark.dist
FIELDS: dict[str, Any] = {
    "capacity": "dropless",
    "router_losses": {
        "load_balance": {"coefficient": 0.5, "scope": "global"},
        "z": {"coefficient": 0.5, "scope": "global"},
    },
}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen rows, of one label up to eight."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(index)
        ids, labels = torch.randint(2, 90, (2, 8), generator=source)
        labels[1 + index % 8 :] = -100
        mask = (torch.arange(8) < 8 - index % 3).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_trainer(folder: Path, rows: int) -> dict[str, Tensor]:
    """The weights after two accumulated steps, `rows` to a batch on each rank."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class InOrder(Seq2SeqTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Rows())

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=rows, gradient_accumulation_steps=2,
        max_steps=2, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    model = wrapped(**FIELDS)
    InOrder(model=model, args=arguments, train_dataset=Rows()).train()
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@contextmanager
def as_torchrun_does(ranks: Ranks) -> Iterator[None]:
    """The environment that transformers and accelerate look a group up by."""
    names = {"RANK": ranks.rank, "LOCAL_RANK": ranks.rank, "WORLD_SIZE": ranks.world}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@claims.over(2)
def trainer_on_two_ranks_is_trainer_on_one(ranks: Ranks) -> None:
    with as_torchrun_does(ranks):
        found = by_trainer(ranks.folder / f"out{ranks.rank}", 2)
    wanted = torch.load(ranks.folder / "trainer.pt", weights_only=True)
    for name, tensor in found.items():
        assert apart(tensor, wanted[name]) < 1e-5, (name, apart(tensor, wanted[name]))


@claims.over(2)
def accelerate_averages_what_ranks_say(ranks: Ranks) -> None:
    from accelerate import Accelerator

    with as_torchrun_does(ranks):
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(wrapped(**FIELDS))
        assert accelerator.num_processes == 2
        accelerator.backward(model(**batch_of(range(ranks.rank * 8, ranks.rank * 8 + 8))).loss)
    wanted = torch.load(ranks.folder / "accelerate.pt", weights_only=True)
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        assert apart(parameter.grad, wanted[name]) < 1e-5, name


def batch_of(indices: range) -> dict[str, Tensor]:
    """Every eight rows have as many labels."""
    rows = [Rows()[index] for index in indices]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    folder = tmp_path_factory.mktemp("ranks")
    start = {name: p.detach().clone() for name, p in wrapped(**FIELDS).named_parameters()}
    torch.save(moved := by_trainer(folder / "alone", 4), folder / "trainer.pt")
    assert any(apart(moved[name], start[name]) > 1e-3 for name in start if ".router." in name)
    whole = wrapped(**FIELDS)
    whole(**batch_of(range(16))).loss.backward()
    torch.save({n: p.grad for n, p in whole.named_parameters()}, folder / "accelerate.pt")
    return started(__name__, folder)


@pytest.mark.parametrize(("world", "claim"), claims.names())
def test_over_ranks(world: int, claim: str, outcomes: dict[tuple[int, str], str]) -> None:
    assert not outcomes[world, claim], outcomes[world, claim]
