"""easy-VQA, 48,000 questions on 5,000 small images, in the files that question answering is published with.

    pip install --no-deps easy-vqa                               # images and questions; its own code is not used
    python benchmarks/real/easyvqa.py --out output/easy-vqa
    upop train vqa --config output/easy-vqa/vqa.yaml --pretrained assets/shapes-nlvr \
        --output-dir output/easy-vqa-dense
    upop compress vqa --config output/easy-vqa/vqa.yaml --pretrained output/easy-vqa-dense/best --ratio 0.5 \
        --epochs 2 --set init_lr=5e-4 --output-dir output/easy-vqa-2x

The dense model begins with the towers of the demo's model, and is trained with the settings of that file. Every tenth
image of the training split, with all its questions, picks the best epoch; the package's own test split is the test.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml

from real import folder_of
from upop.data.answers import ANNOTATORS
from upop.demo.vocabulary import vocabulary
from upop.files import make_folder, write_text

PACKAGE = "easy-vqa"
_CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "vqa.yaml"
_VALIDATION = 10
"""One training image in so many is kept for validation."""
_TRAINING: dict[str, Any] = {"image_size": 64, "max_epoch": 3, "init_lr": 1e-3, "warmup_steps": 100}


def samples(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return the questions of the package's "train" or "test" split as samples of the published format.

    One person answered each question; the format has ten, who agree here.

    Args:
        folder: of the package.
        split: the package's.
    """
    rows = json.loads((folder / "data" / split / "questions.json").read_text(encoding="utf-8"))
    return [
        {
            "question_id": number,
            "question": question,
            "answer": [answer] * ANNOTATORS,
            "image": f"{split}/images/{image}.png",
            "dataset": "vqa",
        }
        for number, (question, answer, image) in enumerate(rows)
    ]


def write(folder: Path, out: Path) -> dict[str, int]:
    """Write annotation files, a vocabulary and settings; return how many samples each file has.

    Args:
        folder: of the package, where the images stay.
        out: a folder that is new, or was written by this function.

    Raises:
        RunFolderError: a file is there that this function did not write.
    """
    train = samples(folder, "train")
    images = sorted({sample["image"] for sample in train})
    held = set(images[::_VALIDATION])
    files = {
        "vqa_train": [sample for sample in train if sample["image"] not in held],
        "vqa_val": [sample for sample in train if sample["image"] in held],
        "vqa_test": samples(folder, "test"),
    }
    annotation, tokenizer = out / "annotation", out / "tokenizer"
    answers = (folder / "data" / "answers.txt").read_text(encoding="utf-8").split()
    settings: dict[str, Any] = yaml.safe_load(_CONFIG.read_text(encoding="utf-8"))
    settings |= {
        "vqa_root": str(folder / "data"),
        "vg_root": str(folder / "data"),
        "ann_root": str(annotation),
        "tokenizer": str(tokenizer),
        "train_files": ["vqa_train"],
        "val_file": "vqa_val",
        "test_file": "vqa_test",
        **_TRAINING,
    }
    make_folder(annotation)
    make_folder(tokenizer)
    for name, found in files.items():
        _write(annotation / f"{name}.json", json.dumps(found))
    _write(annotation / "answer_list.json", json.dumps(answers))
    _write(tokenizer / "vocab.txt", "\n".join(vocabulary()) + "\n")
    _write(out / "vqa.yaml", yaml.safe_dump(settings, sort_keys=False))
    return {name: len(found) for name, found in files.items()}


def _write(path: Path, text: str) -> None:
    """Write a file, unless it is there with this content."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for name, count in write(folder_of("easy_vqa", PACKAGE), out).items():
        print(f"{name}: {count} samples")


if __name__ == "__main__":
    main()
