"""Train a Switch model whose weights are divided among ranks, and load it in one process.

Run: torchrun --nproc-per-node 2 examples/08_more_than_one_device.py

Every rank holds half of the experts and half of all else, and takes half of each batch; what they
learn is what one process would. On a CPU it takes half a minute; on GPUs nothing changes.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import moezoo
from moezoo import parallel
from moezoo.training.checkpoints import checkpoints
from moezoo.training.facts import VOCAB_SIZE, Facts
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.run import run_training

CONFIG = moezoo.SwitchConfig(
    vocab_size=VOCAB_SIZE,
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_heads=4,
    num_layers=2,
    num_experts=4,
    dropout_rate=0.0,
    capacity="dropless",
)
RECIPE, STEPS = TrainingRecipe("adamw", 3e-3), 80


def main(folder: Path) -> None:
    facts = Facts(256, batch_size=64)
    model = moezoo.build(CONFIG, seed=0, mesh=parallel.mesh(ep=2))
    parameters = sum(p.numel() for p in model.parameters())
    held = sum(p.to_local().numel() for p in model.parameters())
    say(f"{parameters:,} parameters, {held:,} of them on this rank")

    run_training(model, facts, RECIPE, folder, steps=STEPS, table_every=STEPS)
    recall = facts.recall(model)  # every rank takes part in every forward
    say(f"{recall:.0%} of {facts.count} facts recalled")
    shards = sorted(path.name for path in checkpoints(folder / "checkpoints")[-1].rglob("shard*"))
    say(f"the last checkpoint: {len(shards) - 1} files; any number of ranks goes on from it")

    moezoo.save(model, folder / "model")  # each rank writes its own bytes
    if dist.get_rank() == 0:
        whole = moezoo.load(folder / "model")
        assert facts.recall(whole) == recall
        print(f"one process reads {type(whole).__name__} and recalls as much")


def say(text: str) -> None:
    """On rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.join()
    with parallel.guard(), tempfile.TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names)  # all ranks use that of rank 0
        main(Path(names[0]))
    parallel.leave()
