"""docs/formats.md names everything that a run leaves, and every field of it."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import runs
from documents import ROOT, section
from upop.cli.report import report
from upop.errors import PreemptedError
from upop.recipes import read_recipes
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.settings import read_settings
from upop.tasks import find_task

PAGE = ROOT / "docs" / "formats.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of captioning, which writes most files, with everything that the budget of published runs logs."""
    folder = tmp_path_factory.mktemp("formats")
    config = runs.make_task("caption", folder, method="reference", cost="reference", ema_decay=0.5)
    task = find_task("caption")
    compress(task, read_settings(task.settings, config, {"output_dir": folder / "run"}))
    compressed = {"output_dir": folder / "run", "pretrained": str(folder / "run" / "best")}
    evaluate_checkpoint(task, read_settings(task.settings, config, compressed))
    report([folder / "run"])
    return folder / "run"


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def fields(value: Any) -> set[str]:
    """Return the names of all fields of nested JSON."""
    if isinstance(value, list):
        return {name for part in value for name in fields(part)}
    return set(value) | {name for part in value.values() for name in fields(part)} if isinstance(value, dict) else set()


@pytest.mark.slow
def test_every_file_of_a_run_is_named(run: Path) -> None:
    rows = re.findall(r"^\| (`.*?) \|", section(PAGE, "The run directory").partition("###")[0], flags=re.MULTILINE)
    names = [name for row in rows for name in code(row)]
    patterns = [re.sub(r"NNNNNNNN|NAME", "*", name) + ("*" if name.endswith("/") else "") for name in names]
    found = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    assert not [file for file in found if not any(fnmatch(file, pattern) for pattern in patterns)]
    unused = {"blended/*", "trackers/*", "vocabulary/*", "bad_images.json", "run.lock"}  # what this run did not ask for
    assert not [p for p in patterns if p not in unused and not any(fnmatch(file, p) for file in found)]


@pytest.mark.slow
def test_fields_of_rows_are_named(run: Path) -> None:
    text = PAGE.read_text().partition("### metrics.jsonl")[2].partition("###")[0]
    rows = runs.rows(run)
    metrics = {name for model in results(run)["models"] for of in model["metrics"].values() for name in of}
    named = {*code(text), "vision", "text"}
    assert {name for row in rows for name in fields(row)} - metrics <= named
    assert {"loss_sparsity", "average"} <= {name for row in rows for name in row}


def results(run: Path) -> Any:
    return json.loads((run / "results.json").read_text())


@pytest.mark.slow
def test_fields_of_files_are_named(run: Path) -> None:
    text = PAGE.read_text()
    found = results(run)
    named = {name.rpartition(".")[2] for name in code(text.partition("### results.json")[2].partition("\n## ")[0])}
    assert {*found, *found["models"][0]} <= named | {"models"}
    plan = json.loads((run / "plan.json").read_text())
    named = {*code(text.partition("### plan.json")[2].partition("###")[0])}
    group = next(iter(plan["groups"].values()))
    assert {*plan, *plan["settings"], *group} <= named
    ours = json.loads((run / "best" / "upop.json").read_text())
    named = {*code(text.partition("### Our folder")[2].partition("###")[0])}
    assert {*ours, *next(iter(ours["layout"].values()))} <= named | {"versions"}
    assert {path.name for path in (run / "best").iterdir()} <= named


def test_numbers_that_the_page_tells() -> None:
    text = PAGE.read_text()
    assert f"| {PreemptedError.exit_code} | the run received SIGTERM" in text
    assert f"The {len(read_recipes())} published runs are rows" in " ".join(text.split())
