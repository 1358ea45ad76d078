"""The comparison of methods: what was measured is not measured again, sizes are equal, and the tables add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import upop

ROOT = Path(__file__).parents[2]
SIZE = 200


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small generated set and a dense classifier of random weights."""
    import dense_tasks

    monkeypatch.setitem(dense_tasks.SAMPLES, "classification", SIZE)
    task, settings = dense_tasks.settings_of("classification", tmp_path, SIZE)
    torch.manual_seed(0)
    upop.save(task.build(settings), str(tmp_path / "classification" / "dense" / "last"))
    return tmp_path


def compare(folder: Path, *more: str) -> list[dict[str, Any]]:
    """Run the benchmark on few steps; return the rows of its store."""
    import quality

    common = ["classification", "--pool", "96", "--batch", "16", "--folder", str(folder), "--out", str(folder)]
    quality.main([*common, "--steps", "4", "--middle", "4", "--reductions", "4x", "--split", "val", *more])
    return [json.loads(line) for line in (folder / "quality_cells.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_resuming(folder: Path) -> None:
    methods = ["--methods", "upop", "L2", "--seeds", "1"]
    rows = compare(folder, *methods)
    names = [(row["method"], row["cost"]) for row in rows]
    assert names == [("dense", "params"), ("upop", "params"), ("L2", "params"), ("upop", "macs"), ("L2", "macs")]
    store = folder / "quality_cells.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    # The third cell was lost, and the machine stopped while the last one was being written.
    marked = [json.dumps({**json.loads(line), "seconds": 1e6}) + "\n" for line in (lines[0], lines[1], lines[3])]
    store.write_text("".join(marked) + lines[4][: len(lines[4]) // 2])
    again = compare(folder, *methods)
    assert [row["seconds"] == 1e6 for row in again] == [True, True, True, False, False]
    fixed = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    repeated = [{name: value for name, value in row.items() if name != "seconds"} for row in again]
    assert sorted(repeated, key=str) == sorted(fixed, key=str)  # a cell depends on nothing that was measured before it
    assert len(compare(folder, *methods[:-1], "2")) == len(rows) + 4  # another seed comes on top


@pytest.mark.slow
def test_methods_are_of_equal_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare(folder, "--seeds", "1", "--methods", "upop", "reference", "no progress", "L2", "Taylor")
    small = [row for row in rows if row["method"] != "dense"]
    assert len(small) == 10
    for cost, size in (("params", "parameters"), ("macs", "macs")):
        sizes = [row[size] for row in small if row["cost"] == cost]
        assert max(sizes) <= 1.02 * min(sizes)
        assert max(sizes) < 0.5 * rows[0][size]
    shown = capsys.readouterr().out
    assert "4x at equal parameters, 4 steps" in shown
    assert "4x at equal GMACs, 4 steps" in shown
    content = json.loads((folder / "quality_val_cpu.json").read_text())
    assert len(content["groups"]) == len(rows)
    assert content["machine"]["threads"] == 1


def test_torch_pruning(folder: Path) -> None:
    pytest.importorskip("torch_pruning")
    methods = ["L2", "Torch-Pruning L2", "Torch-Pruning Taylor"]
    rows = compare(folder, "--seeds", "1", "--methods", *methods)
    sizes = [row["parameters"] for row in rows if row["cost"] == "params" and row["method"] != "dense"]
    assert len(sizes) == 3
    assert max(sizes) <= 1.02 * min(sizes)


def test_failures_are_told_and_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality_methods

    def broken(*_given: Any, **_options: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2 cells failed"):
        patch.setattr(quality_methods, "plan_by_magnitude", broken)
        compare(folder, "--seeds", "1", "--methods", "L2")
    assert len(compare(folder, "--seeds", "1", "--methods", "L2")) == 3


def _row(method: str, seed: int, quality: float, **more: Any) -> dict[str, Any]:
    place = {"split": "test", "cost": "params", "budget": 100, "reduction": "4x", "task": "nlvr", "metric": "accuracy"}
    made = {"parameters": 1000, "macs": 2000, "seconds": 3.0 + seed, "before_cut": 16, "rates": [0.0, 1.0, 0.0]}
    return {**place, "method": method, "seed": seed, "quality": quality, **made, **more}


def test_tables_add_up(tmp_path: Path) -> None:
    from quality_tables import aggregate, ahead, figure, tables

    rows = [_row("dense", 0, 98.0, reduction="1x", budget=0, parameters=4000)]
    rows += [_row("upop", seed, value) for seed, value in enumerate((90.0, 92.0, 94.0))]
    rows += [_row("L2", seed, value) for seed, value in enumerate((80.0, 81.0, 82.0))]
    rows += [_row("larger", seed, 97.0, parameters=1100) for seed in range(3)]
    place = {name: rows[1][name] for name in ("split", "cost", "budget", "reduction", "task", "metric")}
    rows.append({**place, "method": "other", "seed": 0, "unsupported": "it cannot be traced"})
    groups = aggregate(rows)
    mine = next(group for group in groups if group["method"] == "upop")
    assert (mine["mean"], mine["std"], mine["n"], mine["seconds"]) == (92.0, 2.0, 3, 4.0)
    column = [group for group in groups if group["method"] != "dense"]
    assert ahead(column, "upop") == ("L2", 11.0, 2.0)  # what is larger is no rival
    assert ahead(column, "L2") == ("upop", -11.0, 2.0)
    [table] = tables(groups, ["upop", "L2", "larger", "other"], "upop")
    console = Console(width=160, record=True)
    console.print(table)
    text, styled = console.export_text(clear=False), console.export_text(styles=True)
    assert "92.0 ± 2.0  1 k, 4.00 s" in text
    assert "97.0 ± 0.0" in text
    assert "dense 98.0, 4 k" in text
    assert "\x1b[1m92.0 ± 2.0" in styled
    assert "\x1b[1m97.0" not in styled
    assert "upop +11.0 against L2 (spread 2.0): ahead" in text
    assert "other, nlvr: it cannot be traced" in text
    drawn = figure(groups, ["upop", "L2"], 100)
    [panel] = drawn.axes
    points = [container[0].get_xydata().tolist() for container in panel.containers]
    assert points == [[[25.0, 92.0]], [[25.0, 81.0]]]
    assert figure(groups, ["upop", "L2"], 30).axes[0].containers == []
