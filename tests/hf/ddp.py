"""One rank of a Trainer's run under DDP, for tests: FOLDER FIND_UNUSED."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .tiny import batch, wrapped


def main(folder: Path, find_unused: bool) -> None:
    """Two steps on rows of unequal targets; what this rank ends with goes into FOLDER."""
    rows = [{name: x[i] for name, x in batch(8).items()} for i in range(8)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=find_unused,
    )
    model = wrapped()
    Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows).train()
    torch.save(dict(model.state_dict()), folder / f"{arguments.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), bool(int(sys.argv[2])))
