"""Turn a dense Llama into a Mixtral, train it with transformers, and show what its experts do.

Run: python examples/07_upcycle_llama.py [DIRECTORY OF A LLAMA [WHERE TO WRITE]]
     (without, a small one is made, and nothing is left behind)
Needs the extra: pip install 'moezoo[hf]'
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moezoo
from moezoo.adapters.hf import register
from moezoo.adapters.verify import verify

register()
EXPERTS = {"experts_implementation": "moezoo", "output_router_logits": True}  # trained to balance


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
    plan = moezoo.upcycle(source, folder / "moe", num_experts=8).plan
    print(f"{plan.parameters:,} parameters, {plan.active_parameters:,} of them active per token")
    print(verify(folder / "moe", source).line)

    # From here on it is a Mixtral like any other: transformers loads it, its Trainer trains it.
    model = AutoModelForCausalLM.from_pretrained(folder / "moe", **EXPERTS)
    print(f"loaded as {type(model).__name__}")
    data = counting(64, model.config.vocab_size)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=30, per_device_train_batch_size=8,
        learning_rate=1e-2, seed=0, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    sets = {"train_dataset": data, "eval_dataset": data}
    trainer = transformers.Trainer(model=model, args=arguments, **sets)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss {before:.3f} -> {after:.3f} in {arguments.max_steps} steps")
    assert after < before

    # What the experts do, as a page. With a tokenizer in it, a directory is reported on in words:
    # moezoo report DIRECTORY --text FILE --out report.html
    trainer.save_model(str(folder / "trained"))
    trained = AutoModelForCausalLM.from_pretrained(folder / "trained", **EXPERTS)
    ids = torch.stack([row["input_ids"] for row in data])
    page = moezoo.report(trained.eval(), [{"input_ids": ids}], title="A Mixtral that was a Llama")
    for layer in page.document["layers"]:
        print(layer["name"], " ".join(f"{n / sum(layer['load']):4.0%}" for n in layer["load"]))
    print(f"page: {page.save(folder / 'report.html')}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else small_llama(Path(folder))
        main(given, Path(sys.argv[2] if len(sys.argv) > 2 else folder))
