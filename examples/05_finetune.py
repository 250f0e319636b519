"""Upcycle a small T5 and fine-tune it on pairs, as in a translation: names in code to words.

Run: python examples/05_finetune.py [STEPS]

The pairs come from the library of this Python, `readDocument` -> "read document", and are split by
module. With a checkpoint of your own, the same is one command:
moezoo finetune CHECKPOINT OUT --task translation --pairs FILE
"""

import sys
from dataclasses import replace

import torch

import moezoo
from moezoo.training.batches import pair_batches
from moezoo.training.evaluation import measured
from moezoo.training.loop import StepRecord, TrainingState, evaluate, fit, start
from moezoo.training.recipes import recipe
from moezoo.training.tasks import Pair, identifier_pairs, split_pairs, task

TASK = replace(task("identifiers"), max_source=48, max_target=48)  # counted in bytes
TOKENIZER = moezoo.ByteTokenizer()


def dense() -> torch.nn.Module:
    """A T5 over bytes, with random weights: a checkpoint of yours would be moezoo.load(path)."""
    config = moezoo.SwitchConfig(
        vocab_size=TOKENIZER.vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=2,
        dropout_rate=0.0,
    )
    return moezoo.build(config, seed=0)


def main(steps: int) -> None:
    train, held_out = split_pairs(identifier_pairs())
    held_out = held_out[:64]
    print(f"{len(train):,} pairs to train on, such as {train[0]}")

    model = moezoo.upcycle(dense(), num_experts=4, layers="odd", seed=0)
    data, check = batches(train, 32), batches(held_out, 32)
    before = evaluate(model, check, count=2)["cross_entropy"]

    # The recipe is plain values; change what you like.
    settings = recipe("finetune").with_changes(optimizer="adamw", learning_rate=3e-3, warmup=20)
    fit(start(model, settings, steps=steps), data, settings, steps=steps, on_step=shown)

    metrics, answers = measured(model, TOKENIZER, held_out, TASK)
    for (name, words), answer in list(zip(held_out, answers, strict=True))[:4]:
        print(f"  {name:<24} wanted: {words:<28} found: {answer}")
    print(f"held-out loss {before:.3f} -> {metrics['cross_entropy']:.3f} nats per byte,", end=" ")
    print(f"{metrics['exact_match']:.0%} of the answers exact, F1 {metrics['token_f1']:.2f}")
    assert metrics["cross_entropy"] < before


def batches(pairs: list[Pair], batch_size: int):
    sizes = {"max_source": TASK.max_source, "max_target": TASK.max_target}
    return pair_batches(pairs, TOKENIZER, batch_size=batch_size, prefix=TASK.prefix, **sizes)


def shown(state: TrainingState, record: StepRecord) -> None:
    if record.step % 50 == 0:
        loss, dropped = record.losses["cross_entropy"], record.dropped
        print(f"step {record.step}: loss {loss:.3f}, {dropped:.0%} of the pairs dropped")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 150)
