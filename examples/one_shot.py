"""Prune a quarter of a decoder's prunable parameters with a few batches and no training."""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import upop


def main() -> None:
    """Prune, and generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.25)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # Your model: AutoModelForCausalLM.from_pretrained(...), for example.
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    # Your batches, as the model takes them; labels give the loss by which importance is measured.
    batches = []
    for _ in range(8):
        ids = torch.randint(256, (4, 32))
        batches.append({"input_ids": ids, "labels": ids})

    before = upop.count_parameters(model)
    plan = upop.calibrate(model, batches, arguments.ratio)
    print(f"{before:,} parameters before, {upop.count_parameters(model):,} now")
    for name, kept in plan.items():
        print(f"{name}: keeps {len(kept)}")
    text = model.generate(ids[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    print("generates", text[0].tolist())


if __name__ == "__main__":
    main()
