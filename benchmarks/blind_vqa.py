"""How far generated questions can be answered without images: the accuracy of each question's most common answer.

python benchmarks/blind_vqa.py
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

from upop.cli.shapes import write_with_progress
from upop.metrics.vqa import answer_accuracy


def main() -> None:
    """Count the answers of the training split, and evaluate the most common one in validation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000, help="training samples of the generated data")
    parser.add_argument("--folder", type=Path, default=Path("output/benchmarks/data"), help="of the generated data")
    arguments = parser.parse_args()
    place = arguments.folder / f"vqa-{arguments.samples}"
    data = write_with_progress("vqa", place, seed=0, size=arguments.samples)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in json.loads((data.annotation / "vqa_train.json").read_text()):
        given[sample["question"]].update(sample["answer"])
    commonest = {question: answers.most_common(1)[0][0] for question, answers in given.items()}
    asked = json.loads((data.annotation / "vqa_val.json").read_text())
    scores = [answer_accuracy(commonest.get(sample["question"], "yes"), sample["answer"]) for sample in asked]
    print(f"accuracy without images: {100 * sum(scores) / len(scores):.1f} % of {len(scores)} questions")


if __name__ == "__main__":
    main()
