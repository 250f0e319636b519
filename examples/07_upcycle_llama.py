"""Turn a dense Llama into a Mixtral that computes the same, and train it with transformers.

Run: python examples/07_upcycle_llama.py [DIRECTORY OF A LLAMA]     (without, a small one is made)
Needs the extra: pip install 'moezoo[hf]'
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    logging,
)

import moezoo
from moezoo.adapters.verify import verify


def small_llama(folder: Path) -> Path:
    """A checkpoint as save_pretrained leaves it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return folder / "llama"


def counting(rows: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 24 ids that count up by one: something that can be learnt in seconds."""
    torch.manual_seed(1)
    starts = torch.randint(3, vocabulary - 24, (rows, 1))
    return [{"input_ids": ids, "labels": ids} for ids in starts + torch.arange(24)]


def main(source: Path, folder: Path) -> None:
    # Streamed from disk to disk. Every layer gets 8 experts, every token the 2 best of them.
    report = moezoo.upcycle(source, folder / "moe", num_experts=8)
    plan = report.plan
    print(f"{plan.parameters:,} parameters, {plan.active_parameters:,} of them active per token")
    print(verify(folder / "moe", source).line)

    # From here on it is a Mixtral like any other: transformers loads it, its Trainer trains it.
    model = AutoModelForCausalLM.from_pretrained(folder / "moe", output_router_logits=True)
    print(f"loaded as {type(model).__name__}")
    data = counting(64, model.config.vocab_size)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=30, per_device_train_batch_size=8,
        learning_rate=1e-2, seed=0, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss {before:.3f} -> {after:.3f} in {arguments.max_steps} steps")
    assert after < before

    # Where the tokens go: of each layer, the share of every expert.
    ids = torch.stack([row["input_ids"] for row in data])
    for layer, scores in enumerate(model.eval()(ids).router_logits):
        counts = torch.bincount(scores.topk(2).indices.flatten(), minlength=8)
        print(f"layer {layer}:", " ".join(f"{int(c) / int(counts.sum()):4.0%}" for c in counts))


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else small_llama(Path(folder))
        main(given, Path(folder))
