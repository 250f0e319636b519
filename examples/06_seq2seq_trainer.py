"""Fine-tune a Switch model with transformers' Seq2SeqTrainer, and load it by its Auto class.

Run: python examples/06_seq2seq_trainer.py [STEPS]        (pip install 'moezoo[hf]')

The pairs come from the library of this Python, `readDocument` -> "read document", split by module.
A checkpoint of yours comes by AutoModelForSeq2SeqLM.from_pretrained(PATH).
"""

import sys
import tempfile

import torch
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

import moezoo
from moezoo.adapters.hf import AdaptRouters, MoezooForConditionalGeneration, register
from moezoo.tokenizer import padded
from moezoo.training.tasks import Pair, exact_match, identifier_pairs, split_pairs, token_f1

TOKENIZER = moezoo.ByteTokenizer()
SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "dropout_rate": 0}


def collated(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    source = padded([TOKENIZER.encode(name) for name, _ in pairs], value=TOKENIZER.pad_id)
    labels = padded([TOKENIZER.encode(words) for _, words in pairs], value=-100)
    return {**vars(source), "labels": labels.input_ids}


def metrics(found) -> dict[str, float]:
    wanted = [TOKENIZER.decode(row[row >= 0].tolist()) for row in found.label_ids]
    answers = [TOKENIZER.decode(row[row >= 0].tolist()) for row in found.predictions]
    print(f"  wanted: {wanted[:3]}\n  found:  {answers[:3]}")
    return {"exact_match": exact_match(answers, wanted), "token_f1": token_f1(answers, wanted)}


def main(steps: int, folder: str) -> None:
    train, held_out = split_pairs(identifier_pairs())
    dense = moezoo.build(moezoo.SwitchConfig(vocab_size=TOKENIZER.vocab_size, **SIZES), seed=0)
    model = MoezooForConditionalGeneration.wrap(moezoo.upcycle(dense, num_experts=4, seed=0))
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            predict_with_generate=True,
            generation_max_length=40,
            use_cpu=True,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=collated,
        train_dataset=train,
        eval_dataset=held_out[:64],
        compute_metrics=metrics,
        callbacks=[AdaptRouters()],  # for routers that balance themselves
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(folder)

    register()  # model_type: moezoo
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder)
    batch = collated(held_out[:8])
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    print(f"loaded again by its Auto class: {type(loaded).__name__}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as saved:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, saved)
