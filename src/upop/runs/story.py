"""Collects the facts of a compression run for the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upop.checkpoints.saving.card import Story
from upop.report.results import LATENCY, Results, latency_note, left_out_note, table_cells
from upop.runs.task import Task
from upop.settings import RunSettings


def story_of(
    task: Task[Any],
    settings: RunSettings,
    results: Results,
    command: str,
    changed: Sequence[str] = (),
    *,
    trained: bool = True,
) -> Story:
    """Return the facts of a compression run for the model card.

    Args:
        task: of the model.
        settings: of the run.
        results: of the run; the compressed model is the last one.
        command: the command line.
        changed: inputs that had changed when the run was resumed, in words.
        trained: whether the model was trained during or after the cut.
    """
    cells = table_cells(results)
    columns = list(next(iter(cells.values())))
    facts = {
        f"data ({name})": str(value) for name, value in settings if isinstance(value, Path) and name != "output_dir"
    }
    epochs = settings.all_epochs
    if not trained:
        facts |= {"training": "none", "seed": str(settings.seed)}
    elif settings.method == "reference":
        facts |= {"epochs of search": str(settings.searching_epochs)}
        facts |= {"epochs of retraining": str(settings.retraining_epochs)}
    else:
        facts |= {f"epochs of {'search and ' if settings.method == 'upop' else ''}retraining": str(epochs)}
    if trained:
        facts |= {"method": settings.method, "seed": str(settings.seed)}
    facts |= {"changed while it was trained": "; ".join(changed)} if changed else {}
    found = {metric for split in results.models[-1].metrics.values() for metric in split}
    return Story(
        name=results.models[-1].name,
        task=task.name,
        pipeline=task.pipeline_for(settings),
        base=settings.pretrained,
        facts=facts,
        metrics=[metric for metric in results.shown if metric in found],
        columns=columns,
        rows=[
            (name, [f"{cell.text} ({cell.gain})" if cell.gain else cell.text for cell in row.values()])
            for name, row in cells.items()
        ],
        note=" ".join(
            f"{note}." for note in (latency_note(results) if LATENCY in columns else "", left_out_note(results)) if note
        ),
        command=command,
    )
