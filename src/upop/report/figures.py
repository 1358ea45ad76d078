"""Figures of a run: the channels that every layer keeps, and the course of search and retraining.

They are matplotlib figures made without pyplot, so no window, backend or global state is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, ParamSpec

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from upop.errors import SettingError
from upop.files import replacing_file
from upop.ownership import SOFTWARE, wrote_image
from upop.plain import plain
from upop.report.shares import GroupShare, Panel, kept_share, panels

Metrics = Sequence[Mapping[str, Any]]
P = ParamSpec("P")

DPI = 150
# Okabe and Ito's palette, which is safe for colour blindness.
_COLOURS = {"vision": "#0072B2", "text": "#D55E00"}
_OTHER = "#009E73"
_INK, _FAINT, _TRACK = "#222222", "#8a8a8a", "#ececec"
_PHASES = {"search": "#f3efe2", "retrain": "#e6eff5", "train": "#f0f0f0"}


def _literally(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw a figure without math text: $ in a name would start a formula, and an invalid one raises an error."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


def save_figure(figure: Figure, path: Path, *, overwrite: bool = False) -> None:
    """Write a figure as a PNG of 150 dots per inch on white; the file appears whole or not at all.

    Args:
        figure: the figure.
        path: of the file; a figure that upop wrote there is replaced.
        overwrite: whether to replace any other file, too.

    Raises:
        RunFolderError: upop did not write the file that is there, or it cannot be written.
    """
    with replacing_file(path, overwrite or wrote_image) as part:
        figure.savefig(part, format="png", dpi=DPI, facecolor="white", metadata={"Software": SOFTWARE})


@_literally
def kept_share_figure(shares: Iterable[GroupShare], title: str = "What every layer keeps") -> Figure:
    """Draw the share of channels kept: a block per modality, a row per structure, layers along x.

    Args:
        shares: one per group, from `GroupShare.of(groups, plan)`.
        title: of the figure.

    Raises:
        SettingError: there is no group to draw.
    """
    rows = panels(shares)
    if not rows:
        raise SettingError("kept_share_figure was given no group to draw.")
    blocks = [list(block) for _, block in groupby(rows, key=lambda panel: panel.modality)]
    layers = max(len(panel.layers) for panel in rows)
    width = min(max(5.5, 2.2 + 0.5 * layers), 13.0)
    figure = _figure(width, 0.5 + 0.55 * len(blocks) + 1.15 * len(rows), title)
    heights = [0.45 + len(block) for block in blocks]
    places = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, block in zip(places, blocks, strict=True):
        _modality_block(place, block, layers)
    figure.axes[-1].set_xlabel("layer, from input to output", fontsize=9, color=_INK)
    return figure


@_literally
def history_figure(
    metrics: Metrics, *, metric: str = "accuracy", dense: float | None = None, title: str = "How the run went"
) -> Figure:
    """Draw the evaluation metric, the masked share and the training loss over a run's steps.

    Args:
        metrics: the rows of metrics.jsonl. Training rows have "loss" (during the search also "ratio" and "kept"),
            evaluation rows have `metric`; all have "phase" and "step", which counts over all phases.
        metric: name of the evaluation metric, in percent.
        dense: the dense model's metric, drawn as a dashed line.
        title: of the figure.

    Raises:
        SettingError: there is no row to draw.
    """
    rows = sorted(metrics, key=lambda row: int(row["step"]))
    evaluated = [row for row in rows if metric in row]
    trained = [row for row in rows if "loss" in row]
    if not evaluated and not trained:
        raise SettingError(f"history_figure found neither {metric!r} nor 'loss' in any of {len(rows)} rows.")
    searched = [row for row in trained if "ratio" in row and row["phase"] == "search"]
    heights = [height for found, height in ((evaluated, 3.3), (searched, 2.2), (trained, 1.5)) if found]
    figure = _figure(9, 1.0 + sum(heights), title)
    places = iter(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    if evaluated:
        _metric_panel(next(places), evaluated, metric, dense)
    if searched:
        _ratio_panel(next(places), searched)
    if trained:
        _loss_panel(next(places), trained)
    for axes in figure.axes:
        _shade_phases(axes, rows, named=axes is figure.axes[0])
        _quiet(axes)
    figure.axes[-1].set_xlabel("training step", fontsize=9, color=_INK)
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK)
    return figure


def _modality_block(place: SubFigure, block: list[Panel], layers: int) -> None:
    modality = block[0].modality
    groups = [group for panel in block for group in panel.layers]
    colour = _COLOURS.get(modality, _OTHER)
    channels = sum(group.size for group in groups)
    heading = f"{plain(modality.capitalize())}: {_percent(kept_share(groups))} of {channels:,} channels kept"
    place.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold", color=colour)
    for axes, panel in zip(place.subplots(len(block), 1, squeeze=False)[:, 0], block, strict=True):
        _share_panel(axes, panel, layers, colour)


def _share_panel(axes: Axes, panel: Panel, layers: int, colour: str) -> None:
    positions = range(1, len(panel.layers) + 1)
    values = [100 * group.share for group in panel.layers]
    axes.bar(positions, [100] * len(values), width=0.8, color=_TRACK)
    axes.bar(positions, values, width=0.8, color=colour)
    crowded = layers > 14
    for position, value in zip(positions, values, strict=True):
        inside = value > 60
        axes.annotate(
            f"{value:.0f}" if crowded else f"{value:.0f}%",
            (position, value),
            xytext=(0, -2 if inside else 2),
            textcoords="offset points",
            ha="center",
            va="top" if inside else "bottom",
            fontsize=6.5 if crowded else 8,
            color="white" if inside else _INK,
        )
    heading = f"{plain(panel.title)}: {_percent(kept_share(panel.layers))}"
    axes.set_title(heading, loc="left", fontsize=9, color=_INK, pad=3)
    axes.set(xlim=(0.4, layers + 0.6), ylim=(0, 100), xticks=list(positions), yticks=[0, 50, 100])
    axes.set_ylabel("kept (%)", fontsize=8, color=_INK)
    _quiet(axes)
    # The axis of a tower with fewer layers ends at its last bar.
    axes.spines["bottom"].set_bounds(0.4, len(values) + 0.6)


def _metric_panel(axes: Axes, rows: Metrics, metric: str, dense: float | None) -> None:
    splits = dict.fromkeys(str(row.get("split", metric)) for row in rows)
    for split, marker in zip(splits, cycle("os^D"), strict=False):
        mine = [row for row in rows if str(row.get("split", metric)) == split]
        steps, values = [row["step"] for row in mine], [row[metric] for row in mine]
        axes.plot(steps, values, color=_COLOURS["vision"], marker=marker, markersize=4, label=plain(split))
        beside: dict[str, Any] = {
            "xytext": (6, 0),
            "textcoords": "offset points",
            "va": "center",
            "fontsize": 9,
        }
        axes.annotate(f"{values[-1]:.1f}", (steps[-1], values[-1]), **beside)
    if dense is not None:
        axes.axhline(dense, color=_INK, linestyle="--", linewidth=1, label=f"dense model: {dense:.1f}")
    axes.set_ylabel(f"{plain(metric)} (%)", fontsize=9, color=_INK)
    axes.margins(y=0.15)
    axes.legend(fontsize=8, frameon=False, loc="best")


def _ratio_panel(axes: Axes, rows: Metrics) -> None:
    steps, target = [row["step"] for row in rows], [100 * row["ratio"] for row in rows]
    axes.plot(steps, target, color=_INK, linewidth=2, label="target for all groups")
    for modality in dict.fromkeys(name for row in rows for name in row.get("kept", {})):
        mine = [row for row in rows if modality in row.get("kept", {})]
        steps, masked = [row["step"] for row in mine], [100 * (1 - row["kept"][modality]) for row in mine]
        axes.plot(steps, masked, color=_COLOURS.get(modality, _OTHER), linewidth=1.3, label=plain(modality))
    axes.set_ylabel("masked (%)", fontsize=9, color=_INK)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _loss_panel(axes: Axes, rows: Metrics) -> None:
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=_FAINT, linewidth=0.8)
    axes.set_ylabel("training loss", fontsize=9, color=_FAINT)


def _shade_phases(axes: Axes, rows: Metrics, named: bool) -> None:
    start = min(int(row["step"]) for row in rows)
    for phase in dict.fromkeys(str(row["phase"]) for row in rows):
        end = max(int(row["step"]) for row in rows if row["phase"] == phase)
        axes.axvspan(start, end, color=_PHASES.get(phase, _TRACK), linewidth=0, zorder=0)
        if named:
            above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text((start + end) / 2, 1.02, plain(phase), fontsize=10, color=_INK, **above)
        start = end


def _quiet(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
