"""What a run measured: one row per model, kept as JSON, shown as a table beside the dense model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upop.errors import DataError, nearest
from upop.files import replacing_file
from upop.reading import read_object
from upop.report.terminal import FittingTable
from upop.values import problems

NO_PERCENT = frozenset({"loss", "perplexity"})
"""Metrics that are no percentages."""
_LEAST, _MOST = 1e-15, 1e15  # of numbers that are divided by each other


class ModelResult(BaseModel):
    """What was measured of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description='what the table calls it: "dense", "UPop 2x", "magnitude 2x"')
    metrics: Mapping[str, Mapping[str, float]] = Field(description="split -> metric -> value, in percent")
    parameters: int = Field(gt=0, le=2**53)
    gmacs: float = Field(ge=_LEAST, le=_MOST, description="10^9 multiply-adds of one forward pass")
    published_parameters: int | None = Field(
        None, gt=0, le=2**53, description="counted as published, where that differs"
    )
    published_gmacs: float | None = Field(None, ge=_LEAST, le=_MOST)
    latency_ms: float | None = Field(
        None, ge=_LEAST, le=_MOST, description="median of one forward pass; None where not measured"
    )


class Results(BaseModel):
    """What was measured in one run, all models under the same conditions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    models: tuple[ModelResult, ...] = Field(min_length=1)
    shown: tuple[str, ...] = Field(default=("accuracy",), description="the metrics that the table shows")
    baseline: str = Field(default="dense", description="the model that the others are compared with")
    batch_size: int = Field(default=1, gt=0, description="samples in the batch of the latency measurement")
    machine: Mapping[str, str | int] = Field(default_factory=dict, description="from `machine()`")
    left_out: Mapping[str, tuple[int, int]] = Field(
        default_factory=dict,
        description="split -> how many samples count in no score, since their images cannot be read, and of how many",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Results:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"every model needs a name of its own; found {names}")
        if self.baseline not in names:
            raise ValueError(f"the baseline {self.baseline!r} is none of the models{nearest(self.baseline, names)}")
        return self

    @property
    def dense(self) -> ModelResult:
        """The model that the others are compared with."""
        return next(model for model in self.models if model.name == self.baseline)

    def compared(self, name: str) -> dict[str, float]:
        """Return what a model gained and lost beside the dense one.

        Keys: "smaller", "fewer_macs" and, where both were timed, "faster" (factors: 2 is half the size, work
        or time); "<split> <metric> points" (difference in percentage points) for the splits and metrics of both.

        Raises:
            KeyError: there is no model of that name.
        """
        model = {model.name: model for model in self.models}[name]
        factors = {
            "smaller": self.dense.parameters / model.parameters,
            "fewer_macs": self.dense.gmacs / model.gmacs,
        }
        if self.dense.latency_ms is not None and model.latency_ms is not None:
            factors["faster"] = self.dense.latency_ms / model.latency_ms
        dense = self.dense.metrics
        return factors | {
            f"{split} {metric} points": value - dense[split][metric]
            for split, values in model.metrics.items()
            for metric, value in values.items()
            if metric in dense.get(split, {})
        }

    def content(self) -> dict[str, Any]:
        """Return the results and the comparison with the dense model, in the form of JSON."""
        content = self.model_dump(mode="json")
        for model in content["models"]:
            model["compared"] = self.compared(model["name"])
        return content

    def write_json(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the results and the comparison with the dense model; the file appears whole or not at all.

        Args:
            path: of the file.
            overwrite: whether a file that holds no results may be replaced too.

        Raises:
            RunFolderError: there is another file of that name, or it cannot be written.
        """
        with replacing_file(path, overwrite or _holds_results) as part:
            part.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write_json` wrote.

        Raises:
            DataError: the file cannot be read, or does not hold results.
        """
        content = read_object(path, DataError, "Restore it, or evaluate again.")
        models = content.get("models")
        for model in models if isinstance(models, list) else ():
            if isinstance(model, dict):
                model.pop("compared", None)  # follows from the rest
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            described = f"{path}: expected results as Results.write_json writes them; {problems(error)[0]}."
            raise DataError(described) from error


def _holds_results(path: Path) -> bool:
    try:
        Results.read(path)
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Cell:
    """One number of a table of results.

    Attributes:
        value: as measured; None where it was not.
        text: as shown.
        gain: beside the dense model: "-1.8", "1.73x smaller", "1.10x slower"; empty for the dense model itself.
        better: whether that is a gain or a loss; None where there is neither.
    """

    value: float | None
    text: str
    gain: str = ""
    better: bool | None = None


_WORDS = {"smaller": "larger", "fewer": "more", "faster": "slower"}
"""What a gain is called -> what it is called where it is a loss."""


def times(factor: float, word: str) -> str:
    """Return a factor by what it is: 1.6 "faster" is "1.60x faster", 0.8 is "1.25x slower", 1 is "1.00x".

    Args:
        factor: above 1 where the word is true.
        word: "smaller", "fewer" or "faster".
    """
    same = "1.00x"
    if f"{factor:.2f}x" == same or f"{1 / factor:.2f}x" == same:
        return same
    return f"{factor:.2f}x {word}" if factor > 1 else f"{1 / factor:.2f}x {_WORDS[word]}"


PARAMETERS, GMACS, LATENCY = "parameters (M)", "GMACs", "latency (ms)"
"""The columns after those of the metrics."""


def table_cells(results: Results) -> dict[str, dict[str, Cell]]:
    """Return the table of results, model -> column -> cell; every model has all columns, in the same order.

    The columns are the shown metrics of every split, parameters, GMACs, and the latency where it was measured.
    """
    metrics = [
        (split, metric)
        for split in dict.fromkeys(split for model in results.models for split in model.metrics)
        for metric in results.shown
        if any(metric in model.metrics.get(split, {}) for model in results.models)
    ]
    timed = any(model.latency_ms is not None for model in results.models)
    table = {}
    for model in results.models:
        gains = {} if model is results.dense else results.compared(model.name)
        cells = {
            f"{split} {metric}{'' if metric in NO_PERCENT else ' (%)'}": _points(
                model.metrics.get(split, {}).get(metric), gains.get(f"{split} {metric} points")
            )
            for split, metric in metrics
        }
        cells[PARAMETERS] = _factor(model.parameters / 1e6, gains.get("smaller"), "smaller")
        cells[GMACS] = _factor(model.gmacs, gains.get("fewer_macs"), "fewer")
        if timed:
            cells[LATENCY] = _factor(model.latency_ms, gains.get("faster"), "faster")
        table[model.name] = cells
    return table


def results_table(results: Results) -> FittingTable:
    """Return a table for the terminal: a row per model, each number beside its gain over the dense one."""
    title = "Compressed models beside the dense one" if len(results.models) > 1 else "Results"
    cells = table_cells(results)
    rows = {
        name: {header: f"{cell.text} ({cell.gain})" if cell.gain else cell.text for header, cell in row.items()}
        for name, row in cells.items()
    }
    timed = any(LATENCY in row for row in cells.values())
    notes = (latency_note(results) if timed else "", left_out_note(results))
    return FittingTable(title, "model", rows, "\n".join(note for note in notes if note))


def left_out_note(results: Results) -> str:
    """Return which samples the scores do not count, in words; empty where they count all."""
    splits = [f"{few} of {total} {split} samples" for split, (few, total) in results.left_out.items()]
    return f"Not scored, since their images cannot be read: {', '.join(splits)}" if splits else ""


def latency_note(results: Results) -> str:
    """Return how the latency was measured, in words."""
    device = results.machine.get("device", "this machine")
    return f"Latency: median, measured side by side, batch {results.batch_size}, {device}"


def number(value: float) -> str:
    """Return a number with three or four digits that count: 0.0123, 1.23, 12.3, 259.5, 1,234."""
    if value >= 999.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.9995 else f"{value:#.3g}"


def _points(value: float | None, difference: float | None) -> Cell:
    if value is None:
        return Cell(None, "-")
    if difference is None:
        return Cell(value, f"{value:.1f}")
    shown = f"{difference:+.1f}"
    if float(shown) == 0:
        return Cell(value, f"{value:.1f}", "0.0")
    return Cell(value, f"{value:.1f}", shown, difference > 0)


def _factor(value: float | None, factor: float | None, word: str) -> Cell:
    if value is None:
        return Cell(None, "-")
    if factor is None:
        return Cell(value, number(value))
    described = times(factor, word)
    return Cell(value, number(value), described, factor > 1 if " " in described else None)
