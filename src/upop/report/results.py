"""Results of a run: one row per model, as JSON, and as a table with comparisons to the dense model."""

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
"""Metrics that are not percentages."""
_LEAST, _MOST = 1e-15, 1e15  # bounds of numbers in ratios


class ModelResult(BaseModel):
    """The measurements of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description='name in the table: "dense", "UPop 2x", "magnitude 2x"')
    metrics: Mapping[str, Mapping[str, float]] = Field(description="split -> metric -> value, in percent")
    parameters: int = Field(gt=0, le=2**53)
    gmacs: float = Field(ge=_LEAST, le=_MOST, description="10^9 multiply-adds of one forward pass")
    published_parameters: int | None = Field(None, gt=0, le=2**53, description="counted as published, if that differs")
    published_gmacs: float | None = Field(None, ge=_LEAST, le=_MOST)
    latency_ms: float | None = Field(
        None, ge=_LEAST, le=_MOST, description="median of one forward pass; None if not measured"
    )


class Results(BaseModel):
    """The results of one run, with all models measured under the same conditions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    models: tuple[ModelResult, ...] = Field(min_length=1)
    shown: tuple[str, ...] = Field(default=("accuracy",), description="the metrics in the table")
    baseline: str = Field(default="dense", description="the model to compare the others with")
    batch_size: int = Field(default=1, gt=0, description="batch size of the latency measurement")
    machine: Mapping[str, str | int] = Field(default_factory=dict, description="from `machine()`")
    left_out: Mapping[str, tuple[int, int]] = Field(
        default_factory=dict,
        description="split -> number of samples left out because of unreadable images, and number of all samples",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Results:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"names of models must be unique; found {names}")
        if self.baseline not in names:
            raise ValueError(f"no model has the name of the baseline, {self.baseline!r}{nearest(self.baseline, names)}")
        return self

    @property
    def dense(self) -> ModelResult:
        """The baseline: the model that the others are compared with."""
        return next(model for model in self.models if model.name == self.baseline)

    def compared(self, name: str) -> dict[str, float]:
        """Compare a model with the dense one.

        Returns:
            "smaller", "fewer_macs" and, if both were timed, "faster": factors, 2 meaning half the size, work or time.
            "<split> <metric> points": differences in percentage points.

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
        """Return the results and the comparison with the dense model, as JSON values."""
        content = self.model_dump(mode="json")
        for model in content["models"]:
            model["compared"] = self.compared(model["name"])
        return content

    def write_json(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the results and the comparison with the dense model; the file appears whole or not at all.

        Args:
            path: of the file.
            overwrite: whether to replace a file that holds no results.

        Raises:
            RunFolderError: the file that is there holds no results, or it cannot be written.
        """
        with replacing_file(path, overwrite or _holds_results) as part:
            part.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file of `write_json`.

        Raises:
            DataError: the file cannot be read, or does not hold results.
        """
        content = read_object(path, DataError, "Restore it, or evaluate again.")
        models = content.get("models")
        for model in models if isinstance(models, list) else ():
            if isinstance(model, dict):
                model.pop("compared", None)  # computed again
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise DataError(
                f"{path} does not hold results as Results.write_json writes them: {problems(error)[0]}. Restore it, or "
                "evaluate again."
            ) from error


def _holds_results(path: Path) -> bool:
    try:
        Results.read(path)
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Cell:
    """A number in the results table.

    Attributes:
        value: as measured; None if it was not.
        text: as shown.
        gain: comparison with the dense model: "-1.8", "1.73x smaller", "1.10x slower"; empty for the dense model.
        better: whether it is a gain or a loss; None if neither.
    """

    value: float | None
    text: str
    gain: str = ""
    better: bool | None = None


_WORDS = {"smaller": "larger", "fewer": "more", "faster": "slower"}
"""Word for a gain -> word for a loss."""


def times(factor: float, word: str) -> str:
    """Return a factor in words: 1.6 and "faster" give "1.60x faster", 0.8 gives "1.25x slower", 1 gives "1.00x".

    Args:
        factor: above 1 if the word applies.
        word: "smaller", "fewer" or "faster".
    """
    same = "1.00x"
    if f"{factor:.2f}x" == same or f"{1 / factor:.2f}x" == same:
        return same
    return f"{factor:.2f}x {word}" if factor > 1 else f"{1 / factor:.2f}x {_WORDS[word]}"


PARAMETERS, GMACS, LATENCY = "parameters (M)", "GMACs", "latency (ms)"
"""The columns after the metrics."""


def table_cells(results: Results) -> dict[str, dict[str, Cell]]:
    """Return the results table, model -> column -> cell; all models have the same columns in the same order.

    The columns are the shown metrics of every split, parameters, GMACs, and latency if it was measured.
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
    """Return a table for the terminal: a row per model, every number with its change from the dense model."""
    title = "Compressed models and the dense one" if len(results.models) > 1 else "Results"
    cells = table_cells(results)
    rows = {
        name: {header: f"{cell.text} ({cell.gain})" if cell.gain else cell.text for header, cell in row.items()}
        for name, row in cells.items()
    }
    timed = any(LATENCY in row for row in cells.values())
    notes = (latency_note(results) if timed else "", left_out_note(results))
    return FittingTable(title, "model", rows, "\n".join(note for note in notes if note))


def left_out_note(results: Results) -> str:
    """Return a note about samples that the scores leave out; empty if they include all."""
    splits = [f"{few} of {total} {split} samples" for split, (few, total) in results.left_out.items()]
    return f"Not scored because of unreadable images: {', '.join(splits)}" if splits else ""


def latency_note(results: Results) -> str:
    """Return a note about the latency measurement."""
    device = results.machine.get("device", "this machine")
    return f"Latency: median, measured alternately, batch {results.batch_size}, {device}"


def number(value: float) -> str:
    """Return a number with three or four significant digits: 0.0123, 1.23, 12.3, 259.5, 1,234."""
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
    gain = times(factor, word)
    return Cell(value, number(value), gain, factor > 1 if " " in gain else None)
