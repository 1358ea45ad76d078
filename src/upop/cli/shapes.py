"""Generated data sets in commands: writing them with a progress bar, and scoring their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from upop.plain import as_text

if TYPE_CHECKING:
    from upop.demo import Summary


def score_captions_of_shapes() -> None:
    """Register the metric "exact" for captions of generated images."""
    from upop.metrics.captions import register_metric

    register_metric(_exact_share)


def _exact_share(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    from upop.demo.reading import exact_share

    return exact_share(captions, references)


def write_with_progress(
    task: str, out: Path, *, seed: int, size: int, image_size: int = 64, image_format: str = "png"
) -> Summary:
    """Write a generated data set, and print a summary."""
    from upop.demo import write_shapes

    console = Console()
    with Progress(console=console) as bar:
        row = bar.add_task("drawing", total=None)
        summary = write_shapes(
            task,
            out,
            seed=seed,
            size=size,
            image_size=image_size,
            image_format=image_format,  # type: ignore[arg-type]
            progress=lambda done, total: bar.update(row, completed=done, total=total),
        )
    counts = ", ".join(f"{count} {split}" for split, count in summary.records.items())
    verb = "Wrote" if summary.written else "Already there:"
    console.print(as_text(f"{verb} {counts} samples over {summary.images} images in {summary.folder}"))
    return summary
