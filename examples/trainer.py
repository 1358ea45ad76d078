"""Compress a text classifier within transformers' Trainer."""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import upop
from upop.integrations import TrainerCallback


def main() -> None:
    """Train once: the callback searches, cuts and continues the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # Your model, trained on your task.
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    model = BertForSequenceClassification(config)
    # Your data set.
    samples = [{"input_ids": torch.randint(256, (16,)), "labels": int(torch.randint(3, ()))} for _ in range(64)]

    before = upop.count_parameters(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=4,
                report_to="none",
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=samples,
            callbacks=[TrainerCallback(ratio=0.5)],
        )
        trainer.train()
        print(f"{before:,} parameters before, {upop.count_parameters(model):,} now")
        trainer.save_model(folder)  # transformers' own saving; `from_pretrained` reads it after `import upop`
        print("reloads as", type(BertForSequenceClassification.from_pretrained(Path(folder))).__name__)


if __name__ == "__main__":
    main()
