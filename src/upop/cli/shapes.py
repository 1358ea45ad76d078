"""`upop data shapes`, with a bar."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from upop.demo.write import Summary, write_shapes
from upop.plain import as_text


def write_with_progress(
    task: str, out: Path, *, seed: int, size: int, image_size: int = 64, image_format: str = "png"
) -> Summary:
    """Write the generated data set and say what was written."""
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
    console.print(as_text(f"{verb} {counts} records over {summary.images} images in {summary.folder}"))
    return summary
