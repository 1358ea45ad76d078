"""Results survive the disk, and the table says what they mean."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from upop.errors import DataError, RunFolderError
from upop.machine import machine
from upop.report import ModelResult, Results, results_table
from upop.report.results import GMACS, LATENCY, PARAMETERS, number, table_cells, times

DENSE = ModelResult(
    name="dense",
    metrics={"dev": {"accuracy": 82.3}, "test": {"accuracy": 83.1}},
    parameters=259_500_000,
    gmacs=132.5,
    latency_ms=2000.0,
)
SMALL = ModelResult(
    name="UPop 2x",
    metrics={"dev": {"accuracy": 80.5}, "test": {"accuracy": 81.1}},
    parameters=150_200_000,
    gmacs=89.4,
    latency_ms=1250.0,
)


def results(**changes: Any) -> Results:
    return Results(**{"models": (DENSE, SMALL), "batch_size": 4, "machine": machine(), **changes})


def shown(found: Results) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(results_table(found))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_gains_are_relative_to_the_dense_model() -> None:
    assert results().compared("UPop 2x") == pytest.approx(
        {
            "smaller": 259.5 / 150.2,
            "fewer_macs": 132.5 / 89.4,
            "faster": 1.6,
            "dev accuracy points": -1.8,
            "test accuracy points": -2.0,
        }
    )
    assert results(baseline="UPop 2x").compared("dense")["faster"] == pytest.approx(1 / 1.6)


def test_the_table_shows_every_number_beside_its_gain() -> None:
    text = shown(results())
    for cell in ("83.1", "81.1 (-2.0)", "259.5", "150.2 (1.73x smaller)", "89.4 (1.48x fewer)"):
        assert cell in text
    assert "2,000" in text
    assert "1,250 (1.60x faster)" in text
    assert "alternately, batch 4" in text
    assert str(machine()["cpu"]) in text


def test_a_model_that_was_not_timed_or_not_evaluated_shows_a_dash() -> None:
    bare = SMALL.model_copy(update={"latency_ms": None, "metrics": {"test": {"accuracy": 81.1}}})
    row = next(line for line in shown(results(models=(DENSE, bare))).splitlines() if "UPop" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[1] == "-"
    assert cells[-1] == "-"
    untimed = DENSE.model_copy(update={"latency_ms": None})
    assert "latency" not in shown(results(models=(untimed, bare))).lower()


def test_results_survive_the_disk_and_the_file_carries_the_gains(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("mine")
    with pytest.raises(RunFolderError, match=r"results\.json already exists: a file of 4 bytes, which begins 'mine'"):
        results().write_json(path)
    assert path.read_text() == "mine"
    for overwrite in (True, False):  # then they are results, and ours
        results().write_json(path, overwrite=overwrite)
    assert Results.read(path) == results()
    assert json.loads(path.read_text())["models"][1]["compared"]["faster"] == 1.6
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read: Expecting"),
        ("[]", "must hold a JSON object"),
        ('{"models": []}', "at least 1"),
        ('{"models": [{"name": "a"}]}', "required"),
    ],
)
def test_a_file_that_holds_no_results_is_named_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        Results.read(path)
    assert str(path) in str(caught.value)


def test_models_need_names_of_their_own_and_a_baseline_among_them() -> None:
    with pytest.raises(ValidationError, match="must be unique"):
        results(models=(DENSE, DENSE))
    with pytest.raises(ValidationError, match="did you mean 'dense'"):
        results(baseline="dens")


def test_the_machine_is_described() -> None:
    about = machine("cpu")
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert about["device"] == about["cpu"]
    assert int(about["cores"]) >= 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (9.996, "10.0"),
        (259.54, "259.5"),
        (999.96, "1,000"),
        (1234.5, "1,234"),
    ],
)
def test_numbers_keep_the_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("factor", "word", "said"),
    [
        (1.6, "faster", "1.60x faster"),
        (0.8, "faster", "1.25x slower"),
        (0.5, "smaller", "2.00x larger"),
        (1 / 3, "fewer", "3.00x more"),
        (1.004, "faster", "1.00x"),
        (0.996, "faster", "1.00x"),
        (0.99, "faster", "1.01x slower"),
    ],
)
def test_a_factor_is_called_what_it_is(factor: float, word: str, said: str) -> None:
    assert times(factor, word) == said


def test_a_model_that_is_slower_and_larger_is_called_so_everywhere() -> None:
    found = results(baseline="UPop 2x")  # beside which the dense model is larger and slower
    cells = table_cells(found)["dense"]
    assert [cells[name].gain for name in (PARAMETERS, GMACS, LATENCY)] == [
        "1.73x larger",
        "1.48x more",
        "1.60x slower",
    ]
    assert not any(cells[name].better for name in (PARAMETERS, GMACS, LATENCY))


def test_the_title_speaks_of_compressed_models_where_there_are_some() -> None:
    assert results_table(results()).title.startswith("Compressed models")
    alone = results()
    assert results_table(Results(models=alone.models[:1])).title == "Results"


def test_names_mean_nothing_to_the_terminal() -> None:
    name = "[/] [bold red]x[/bold red] [link=http://a]b[/link] :smile: \x1b[31m\u202e"
    model = results().models[0].model_copy(update={"name": name})
    found = Results(models=(model,), baseline=name, machine={"device": "[/blue]\x1b]8;;http://a\x07"})
    console = Console(file=io.StringIO(), width=300, color_system="truecolor", force_terminal=True)
    console.print(results_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert r"[/] [bold red]x[/bold red] [link=http://a]b[/link] :smile: \x1b[31m\u202e" in text
    assert r"[/blue]\x1b]8;;http://a\x07" in text
    assert "\x1b]8" not in text and "\u202e" not in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_the_terminal_and_no_word_is_cut(width: int) -> None:
    names, metrics = ("dense", "UPop 2x", "magnitude 2x"), ("TR@1", "TR@5", "IR@1", "IR@5", "r_mean")
    scores = {split: dict.fromkeys(metrics, 81.25) for split in ("val", "test")}
    models = [
        ModelResult(name=name, metrics=scores, parameters=size, gmacs=size / 1e8, latency_ms=size / 1e5)
        for name, size in zip(names, (1_270_000, 730_000, 1_400_000), strict=True)
    ]
    stream = io.StringIO()  # no terminal, as a pipe is none
    Console(file=stream, width=width).print(results_table(Results(models=tuple(models), shown=metrics)))
    printed = stream.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    words = set(re.sub(r"[^\x20-\x7e]", " ", printed).split())
    assert {*metrics, "UPop", "magnitude", "parameters", "latency", "0.730", "(1.74x", "smaller)", "slower)"} <= words
