"""The report of a run, or of several side by side, as one self-contained HTML file without scripts.

Its Content-Security-Policy makes browsers refuse to load anything else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

import upop
from upop.errors import SettingError
from upop.examples import Answer, Example
from upop.files import write_text
from upop.ownership import wrote_page
from upop.plain import plain
from upop.reading import read_bytes
from upop.report.charts import Chart
from upop.report.curves import comparison_charts, run_charts
from upop.report.results import GMACS, LATENCY, PARAMETERS, Cell, Results, latency_note, left_out_note, table_cells
from upop.report.run import Run
from upop.report.shares import GroupShare, Panel, kept_share, panels

_STYLES = ("vision", "text")
_FORMATS = ("PNG", "JPEG")
_LARGEST_IMAGE = 2**23  # bytes; images of runs are smaller
_SIZES = {PARAMETERS: ("parameters", " M"), GMACS: ("multiply-adds", " G"), LATENCY: ("latency", " ms")}
"""Column -> label of its tile, and unit."""
_BRIGHT, _DEEP = 55, 76  # percent from which text turns dark in the dark theme, and light in the light one
_TIMES = "\N{MULTIPLICATION SIGN}"
_WITHOUT = frozenset({"output_dir", "command"})  # these always differ, or have a section of their own
_ON_TOP = frozenset({"task", "verb", "command"})


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page: label, value, and an explanation."""

    label: str
    value: str
    about: str
    better: bool | None = None


@dataclass(frozen=True)
class TableRow:
    """A model in the results table: its run (if there are several), its name, and a cell per column."""

    run: str
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Block:
    """The kept channels of the layers of one modality."""

    modality: str
    style: str
    share: float
    channels: int
    panels: tuple[Panel, ...]
    layers: int


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a data URI, with its alternative text."""

    uri: str
    width: int
    height: int
    about: str


@dataclass(frozen=True)
class Shown:
    """The ground truth of an example, or a model's answer."""

    label: str
    images: tuple[EmbeddedImage, ...]
    text: str | None
    note: str | None
    right: bool | None


@dataclass(frozen=True)
class ShownExample:
    """An example: the inputs, and the answers."""

    prompt: str | None
    images: tuple[EmbeddedImage, ...]
    answers: tuple[Shown, ...]

    @property
    def panels(self) -> bool:
        """Whether to show images side by side: every answer is one image."""
        return bool(self.images) and all(len(answer.images) == 1 for answer in self.answers)


def write_run_page(run: Run, to: Path, *, overwrite: bool = False) -> None:
    """Write the page of a run; an older page is replaced, and with `overwrite` any file.

    Raises:
        RunFolderError: upop did not write the file that is there, or it cannot be written.
    """
    write_text(to, run_page(run), overwrite or wrote_page)


def write_comparison_page(runs: Sequence[Run], to: Path, *, overwrite: bool = False) -> None:
    """Write the page of several runs side by side; an older page is replaced, and with `overwrite` any file.

    Raises:
        SettingError: there are fewer than two runs.
        RunFolderError: upop did not write the file that is there, or it cannot be written.
    """
    write_text(to, comparison_page(runs), overwrite or wrote_page)


def run_page(run: Run) -> str:
    """Return the page of a run, as HTML."""
    columns, rows = _table([run])
    return _render(
        "run.html.j2",
        title=run.model or run.name,
        run=run,
        tiles=_tiles(run.results) if run.results is not None else (),
        columns=columns,
        rows=rows,
        about=_about([run.results], [""]),
        blocks=_blocks(run.shares),
        charts=run_charts(run),
        examples=_examples([run]),
        settings=_settings(run.settings),
        environment=_settings({name: value for name, value in _environment(run).items() if name not in _ON_TOP}),
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the page of several runs side by side, as HTML.

    Raises:
        SettingError: there are fewer than two runs.
    """
    if len(runs) < 2:
        raise SettingError(f"A comparison needs at least two runs; found {len(runs)}.")
    names = distinct_names(runs)
    columns, rows = _table(runs, names)
    charts: list[Chart] = comparison_charts(runs, names)
    return _render(
        "comparison.html.j2",
        title=", ".join(dict.fromkeys(run.model or name for run, name in zip(runs, names, strict=True))),
        runs=list(zip(names, runs, strict=True)),
        columns=columns,
        rows=rows,
        compared=any(cell.gain for row in rows for cell in row.cells),
        led=any(line.path for each in charts if each.x_title in (PARAMETERS, GMACS) for line in each.lines),
        about=_about([run.results for run in runs], names),
        notes=[f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.missing],
        charts=charts,
        blocks=[(name, _blocks(run.shares)) for name, run in zip(names, runs, strict=True) if run.shares],
        examples=_examples(runs),
        settings=_differing([run.settings for run in runs]),
        environment=_differing([_environment(run) for run in runs]),
    )


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return a unique name for every run: its folder's, with as many parent folders as needed."""
    paths = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({place})" for place, run in enumerate(runs, start=1)]  # the same run twice


def ink(share: float) -> str:
    """Return the style classes of a cell whose colour shows a share: they invert its text in one theme or both."""
    percent = round(100 * share)
    return " ".join(name for name, least in (("bright", _BRIGHT), ("deep", _DEEP)) if percent >= least)


def _render(template: str, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("upop.report"),
        autoescape=True,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.0f}"
    environment.globals |= {"kept_share": kept_share, "ink": ink, "upop": upop.__version__}
    return environment.get_template(template).render(**content)


def _plain(value: Any) -> Any:
    """Return a string without control characters, for the template; other values are unchanged."""
    return plain(value) if isinstance(value, Path) or type(value) is str else value


def _tiles(results: Results) -> list[Tile]:
    """Return the tiles: the last model's numbers, compared with the dense model's if there are two."""
    table = table_cells(results)
    cells, before = table[results.models[-1].name], table[results.baseline]
    tiles = []
    deciding = tuple(f" {metric} (%)" for metric in results.shown[:1])
    tested = [name for name, cell in cells.items() if name.endswith(deciding) and cell.value is not None]
    if tested:  # the last split is the test split, if there is one
        cell = cells[tested[-1]]
        change = "no change" if cell.better is None else f"{cell.gain} points"
        about = f"dense {before[tested[-1]].text}, {change}" if cell.gain else ""
        tiles.append(Tile(tested[-1].removesuffix(" (%)"), f"{cell.text} %", about, cell.better))
    for name, (label, group) in _SIZES.items():
        cell = cells.get(name, Cell(None, "-"))
        factor, _, gained = cell.gain.partition(" ")
        change = f"{before[name].text} \N{RIGHTWARDS ARROW} {cell.text}{group}"
        if gained:
            what = f"{gained} {label}" if name == GMACS else gained
            tiles.append(Tile(what, factor.replace("x", _TIMES), change, cell.better))
        elif cell.value is not None:
            tiles.append(Tile(label, f"{cell.text}{group}", change if cell.gain else ""))
    return tiles


def _table(runs: Sequence[Run], names: Sequence[str] = ("",)) -> tuple[list[str], list[TableRow]]:
    """Return the columns of all runs' results, and a row per model.

    Runs with the same dense model and the same measurements of it share its row.
    """
    named = zip(names, runs, strict=True)
    tables = [(name, run.results, table_cells(run.results)) for name, run in named if run.results is not None]
    headers = dict.fromkeys(header for _, _, table in tables for row in table.values() for header in row)
    last = [PARAMETERS, GMACS, LATENCY]
    columns = [*(name for name in headers if name not in last), *(name for name in last if name in headers)]
    rows: list[TableRow] = []
    seen: dict[tuple[Any, ...], int] = {}
    for run, results, table in tables:
        for model in results.models:
            cells = tuple(table[model.name].get(name, Cell(None, "-")) for name in columns)
            key = (model.name, tuple((cell.text, cell.value) for cell in cells), str(model.metrics))
            if model is results.dense and key in seen:
                place = seen[key]
                rows[place] = TableRow(f"{rows[place].run}, {run}", model.name, rows[place].cells)
                continue
            seen[key] = len(rows)
            rows.append(TableRow(run, model.name, cells))
    return columns, rows


def _about(results: Sequence[Results | None], names: Sequence[str]) -> list[str]:
    """Return sentences about the measurements, each once, with names of runs unless it holds for all."""
    of: dict[str, list[str]] = {}
    for name, each in zip(names, results, strict=True):
        if each is not None:
            timed = any(model.latency_ms is not None for model in each.models)
            for note in (latency_note(each) if timed else "", left_out_note(each)):
                of.setdefault(f"{note}.", []).append(name)
    of.pop(".", None)
    finished = sum(each is not None for each in results)
    return [note if len(runs) == finished else f"{', '.join(runs)}: {note}" for note, runs in of.items()]


def _blocks(shares: Sequence[GroupShare]) -> list[Block]:
    blocks = []
    for modality, same in groupby(panels(shares), key=lambda panel: panel.modality):
        mine = tuple(same)
        groups = [group for panel in mine for group in panel.layers]
        style = modality if modality in _STYLES else "other"
        longest = max(len(panel.layers) for panel in mine)
        blocks.append(Block(modality, style, kept_share(groups), sum(group.size for group in groups), mine, longest))
    return blocks


def _examples(runs: Sequence[Run]) -> list[tuple[str, list[ShownExample]]]:
    """Return sections of examples: a sentence about them, and the examples. Runs with the same samples share one."""
    merged: dict[tuple[str, tuple[Any, ...]], list[tuple[Run, Sequence[Example]]]] = {}
    for run in runs:
        if run.examples is not None and run.examples.samples:
            inputs = tuple((each.prompt, each.images, each.truth) for each in run.examples.samples)
            merged.setdefault((run.examples.about, inputs), []).append((run, run.examples.samples))
    return [
        (about, [_shown([(run, samples[place]) for run, samples in found]) for place in range(len(inputs))])
        for (about, inputs), found in merged.items()
    ]


def _shown(found: Sequence[tuple[Run, Example]]) -> ShownExample:
    first_run, first = found[0]
    folder = first_run.examples_folder
    images = tuple(_image(folder / name, "input") for name in first.images)
    answers = [_answer("truth", first.truth, folder)] if first.truth is not None else []
    known: dict[str, Answer] = {}
    for run, example in found:
        for model, answer in example.answers.items():
            # Runs share the dense model; other models of the same name get the name of their run.
            if known.get(model) == answer:
                continue
            label = model if model not in known else f"{model} ({run.name})"
            known[label] = answer
            answers.append(_answer(label, answer, run.examples_folder))
    return ShownExample(first.prompt, images, tuple(answers))


def _answer(label: str, answer: Answer, folder: Path) -> Shown:
    about = "ground truth" if label == "truth" else f"answer of {label}"
    images = tuple(_image(folder / name, about) for name in answer.images)
    return Shown(label, images, answer.text, answer.note, answer.right)


def _image(path: Path, about: str) -> EmbeddedImage:
    try:
        if path.is_symlink():
            raise ValueError("a link may lead out of the run's folder")
        content = read_bytes(path, _LARGEST_IMAGE)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            kind, (width, height) = str(image.format), image.size
    except Exception:  # decoders raise errors of any type; the page shows a gap
        return EmbeddedImage("", 0, 0, f"{path.name} is missing or not an image")
    encoded = base64.b64encode(content).decode()
    return EmbeddedImage(f"data:image/{kind.lower()};base64,{encoded}", width, height, about)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _value(value)) for name, value in settings.items()]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(each)}" for name, each in value.items()) or "none"
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("...").strip()


def _differing(mappings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the names whose values differ, with all values; "-" for a missing one."""
    found = []
    for name in dict.fromkeys(name for mapping in mappings for name in mapping):
        values = [_value(mapping[name]) if name in mapping else "-" for mapping in mappings]
        if len(set(values)) > 1 and name not in _WITHOUT:
            found.append((name, values))
    return found


def _environment(run: Run) -> dict[str, Any]:
    machine = dict(run.results.machine) if run.results is not None else {}
    about = {"task": run.task, "verb": run.verb, "command": run.command, "python": run.python}
    return {**about, **run.libraries, **machine}
