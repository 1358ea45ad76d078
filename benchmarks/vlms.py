"""A small SmolVLM-shaped model on generated questions: trained from scratch, then pruned, with and without recovery.

    python benchmarks/vlms.py prepare output/vlms            # data, and a folder with only config and processor
    upop train chat --config output/vlms/train.yaml
    python benchmarks/vlms.py kinds output/vlms              # accuracy of the dense model, by kind of question
    python benchmarks/vlms.py prune output/vlms              # one-shot at all sizes, by tower
    python benchmarks/vlms.py teachers output/vlms           # distillation losses at one size, three seeds
    python benchmarks/vlms.py table output/vlms

Everything is measured on the test questions, in exact answers; the rows go to benchmarks/results/vlms.json. Existing
rows are kept, so a stopped run continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from upop.data.chat import IGNORED
from upop.demo.write import write_shapes
from upop.runs.verbs import compress
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.chat import token_losses
from upop.tasks.prune import prune

RESULTS = Path(__file__).parent / "results" / "vlms.json"
TARGETS = ("params=1.25x", "params=1.5x", "params=2x", "params=3x")
TOWERS: dict[str, tuple[str, ...]] = {"all": (), "text": ("text",)}
TEACHERS = {
    "nobody": {"distill": 0, "distill_logits": 0},
    "hidden states": {"distill": 5, "distill_logits": 0},
    "logits": {"distill": 0, "distill_logits": 1},
    "both": {"distill": 5, "distill_logits": 1},
}
SIDE, PATCH = 48, 16
"""A patch shows one of the nine cells in which shapes lie."""
BACKGROUND, SPREAD = 0.94, 0.25
"""The mean and the spread of pixels: with the background at zero, patches differ by the shapes in them alone."""
EPOCHS = 6
SCALE = 0.06
"""Standard deviation of fresh weights; the 0.02 of wide models keeps attention even for long in narrow ones."""
HELD_OUT = {"val": 300, "test": 600}
"""Rows that decide which epoch is best, and rows of the tables."""
MARKS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<start>")
TEMPLATE = (
    "{% for message in messages %}<start>{{ message.role }}: {% for part in message.content %}{% if part.type == "
    "'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant: {% endif %}"
)


def prepare(out: Path, size: int) -> None:
    """Write the data, a folder of the model without weights, and the settings of its training."""
    write_shapes("chat", out / "data", seed=0, size=size, image_size=SIDE)
    for split, count in HELD_OUT.items():
        lines = (out / "data" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (out / "data" / f"{split}-few.jsonl").write_text("".join(lines[:count]))
    rows = [json.loads(line) for line in (out / "data" / "train.jsonl").read_text().splitlines()]
    texts = [f"{row['question']} {row['answer']} user: assistant:" for row in rows]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", *MARKS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    images = transformers.SmolVLMImageProcessor(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
        image_mean=[BACKGROUND] * 3,
        image_std=[SPREAD] * 3,
    )
    tokens = (SIDE // PATCH) ** 2
    processor = transformers.Idefics3Processor(images, words, image_seq_len=tokens, chat_template=TEMPLATE)
    processor.save_pretrained(out / "blank")
    vision = transformers.SmolVLMVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=SCALE,
    )
    text = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        vocab_size=len(words),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=SCALE,
    )
    kind: Any = transformers.SmolVLMConfig
    config = kind(
        vision_config=vision,
        text_config=text,
        scale_factor=1,
        image_token_id=made.token_to_id("<image>"),
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=SCALE,
    )
    config.architectures = ["SmolVLMForConditionalGeneration"]
    config.save_pretrained(out / "blank")
    settings = {
        **_shared(out),
        "pretrained": str(out / "blank"),
        "output_dir": str(out / "dense"),
        "init_lr": 2e-3,
        "warmup_steps": 200,
        "batch_size_train": 64,
        "epochs": EPOCHS,
        "generate": False,
    }
    del settings["test_data"]
    (out / "train.yaml").write_text(yaml.safe_dump(settings))


def _shared(out: Path) -> dict[str, Any]:
    data = out / "data"
    return {
        "data": str(data / "train.jsonl"),
        "val_data": str(data / "val-few.jsonl"),
        "test_data": str(data / "test-few.jsonl"),
        "batch_size_test": 64,
        "max_new_tokens": 12,
        "num_workers": 0,
        "device": "cpu",
        "examples": 0,
    }


def _rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    return found


def _note(row: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps([*_rows(), row], indent=1) + "\n")


def _known(**described: Any) -> bool:
    return any(described.items() <= row.items() for row in _rows())


def _measured(results: Any, **described: Any) -> None:
    dense, small = results.models
    _note(
        {
            **described,
            "dense": dense.metrics["test"],
            "test": small.metrics["test"],
            "parameters": small.parameters,
            "gmacs": small.gmacs,
            "dense_parameters": dense.parameters,
        }
    )


def one_shot(out: Path, seeds: int) -> None:
    """Prune without training, all towers under one budget or the language tower alone."""
    task = find_task("chat")
    for seed in range(seeds):
        for towers, include in TOWERS.items():
            for target in TARGETS:
                described = {"how": "one-shot", "towers": towers, "target": target, "seed": seed}
                if _known(**described):
                    continue
                settings = settings_of(
                    out, seed, target=target, output_dir=str(out / "pruned"), samples=256, include=include
                )
                settings = settings.model_copy(update={"val_data": None, "hold_out": 0.0})
                try:
                    results = prune(task, settings)
                except ValueError as error:  # the language tower alone cannot reach every target
                    _note({**described, "refused": str(error)})
                    continue
                _measured(results, **described)


def teachers(out: Path, seeds: int, epochs: int, target: str) -> None:
    """Compress with recovery, distilling hidden states, logits, both, or nothing."""
    for seed in range(seeds):
        for name, weights in TEACHERS.items():
            described = {"how": "recovery", "teacher": name, "target": target, "epochs": epochs, "seed": seed}
            if _known(**described):
                continue
            place = out / f"taught-{name.replace(' ', '-')}-{seed}"
            settings = settings_of(
                out,
                seed,
                target=target,
                epochs=epochs,
                init_lr=5e-4,
                batch_size_train=32,
                rows=2000,
                generate=True,
                output_dir=str(place),
                **weights,
            )
            _measured(compress(find_task("chat"), settings), **described)


@torch.no_grad()
def by_kind(out: Path) -> None:
    """Record the dense model's accuracy by the first two words of the questions."""
    task = find_task("chat")
    settings = settings_of(out, 0)
    asked: Any = task.dataset(settings, "test")
    model, collate = task.load(Path(str(settings.pretrained)), settings).eval(), task.collate(settings)
    right: dict[str, list[bool]] = {}
    for start in range(0, len(asked), settings.batch_size_test):
        numbers = range(start, min(start + settings.batch_size_test, len(asked)))
        _, labels, likeliest = token_losses(model, collate([asked[number] for number in numbers]))
        for number, good in zip(numbers, ((likeliest == labels) | (labels == IGNORED)).all(1).tolist(), strict=True):
            right.setdefault(" ".join(asked.asked(number).split()[:2]), []).append(good)
    shares = {kind: 100 * sum(found) / len(found) for kind, found in right.items()}
    _note({"how": "dense", "all": 100 * sum(map(sum, right.values())) / len(asked), "kinds": shares})


def settings_of(out: Path, seed: int, **more: Any) -> Any:
    """Return the task's settings for the dense model in a folder; `more` are further ones."""
    given = {**_shared(out), "pretrained": str(out / "dense" / "best"), "seed": seed, **more}
    return read_settings(find_task("chat").settings, None, given)


def table() -> None:
    """Print the rows as a table."""
    for row in _rows():
        if row["how"] == "dense":
            print(row)
            continue
        described = {
            name: value for name, value in row.items() if name in ("how", "towers", "teacher", "target", "seed")
        }
        if "refused" in row:
            print(described, row["refused"][:80])
            continue
        print(
            described,
            f"{row['parameters'] / 1e6:.3f} M",
            {name: round(value, 2) for name, value in row["test"].items()},
        )


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("prepare", "kinds", "prune", "teachers", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=72000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--target", default="params=3x")
    given = parser.parse_args()
    if given.what == "prepare":
        prepare(given.out, given.size)
    elif given.what == "kinds":
        by_kind(given.out)
    elif given.what == "prune":
        one_shot(given.out, given.seeds)
    elif given.what == "teachers":
        teachers(given.out, given.seeds, given.epochs, given.target)
    else:
        table()


if __name__ == "__main__":
    main()
