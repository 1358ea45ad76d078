"""The figures say what the numbers say, and arrive as whole files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from PIL import Image

from upop.errors import RunFolderError, SettingError
from upop.report import GroupShare, history_figure, kept_share_figure, save_figure


def shares(layers: int) -> list[GroupShare]:
    made = []
    for layer in range(layers):
        made.append(GroupShare(f"visual.blocks.{layer}.attn", "vision", "attention", 64, 16))
        made.append(GroupShare(f"visual.blocks.{layer}.mlp", "vision", "mlp", 192, 192))
    return made + [
        GroupShare(f"text.layer.{layer}.self", "text", "attention", 64, 1 + 31 * layer) for layer in range(2)
    ]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def metrics(phases: tuple[str, ...] = ("search", "retrain")) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, phase in enumerate(phases):
        for step in range(100 * number, 100 * (number + 1), 10):
            row: dict[str, Any] = {
                "phase": phase,
                "epoch": 0,
                "step": step,
                "loss": 0.7 - step / 1000,
                "lr": 1e-5,
            }
            if phase == "search":
                masked = 0.5 * math.sin(math.pi * step / 200)
                row |= {"ratio": masked, "kept": {"vision": 1 - masked, "text": 1 - masked / 2}}
            rows.append(row)
        end = 100 * number + 99
        rows.append({"phase": phase, "epoch": 0, "step": end, "split": "dev", "accuracy": 70.0 + number})
    return rows


@pytest.mark.parametrize("layers", [1, 3, 24])
def test_every_layer_has_its_bar_and_its_percentage(layers: int) -> None:
    figure = kept_share_figure(shares(layers))
    attention, mlp, text = figure.axes
    assert texts(attention) == ["25" if layers > 14 else "25%"] * layers
    assert len(texts(mlp)) == layers
    assert texts(text) == (["2", "50"] if layers > 14 else ["2%", "50%"])
    assert [bar.get_height() for bar in attention.patches] == [100] * layers + [25] * layers


def test_titles_give_the_share_kept_of_modality_and_structure() -> None:
    figure = kept_share_figure(shares(3), title="Half the size")
    assert [axes.get_title("left") for axes in figure.axes] == [
        "Attention: 25%",
        "MLP: 100%",
        "Attention: 26%",
    ]
    assert figure.get_suptitle() == "Half the size"
    assert [block.get_suptitle() for block in figure.subfigs] == [
        "Vision: 81% of 768 channels kept",
        "Text: 26% of 128 channels kept",
    ]


def test_a_deeper_model_gets_a_wider_figure_and_a_shallow_one_a_smaller() -> None:
    widths = [kept_share_figure(shares(layers)).get_figwidth() for layers in (3, 12, 24)]
    assert widths == sorted(set(widths))


def test_history_shows_metric_masked_share_and_loss_over_the_phases() -> None:
    figure = history_figure(metrics(), dense=83.1)
    accuracy, masked, loss = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy (%)", "masked (%)", "training loss"]
    assert {"search", "retrain", "71.0"} <= set(texts(accuracy))
    assert list(accuracy.lines[0].get_ydata()) == [70.0, 71.0]
    assert set(accuracy.lines[1].get_ydata()) == {83.1}
    assert accuracy.lines[1].get_linestyle() == "--"
    assert [line.get_label() for line in masked.lines] == ["target for all groups", "vision", "text"]
    assert masked.lines[2].get_ydata()[-1] == pytest.approx(50 * math.sin(math.pi * 90 / 200) / 2)
    assert len(loss.lines[0].get_xdata()) == 20


def test_history_without_a_search_or_a_dense_model_leaves_them_out() -> None:
    figure = history_figure(metrics(("train",)))
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy (%)", "training loss"]
    assert len(figure.axes[0].lines) == 1
    assert "train" in texts(figure.axes[0])


def test_history_reads_the_metric_it_is_told() -> None:
    rows = [{"phase": "retrain", "step": step, "split": "val", "cider": 100.0 + step} for step in (0, 1, 2)]
    figure = history_figure(rows, metric="cider")
    assert list(figure.axes[0].lines[0].get_ydata()) == [100, 101, 102]


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(SettingError, match="no group"):
        kept_share_figure([])
    with pytest.raises(SettingError, match="'spice' nor 'loss'"):
        history_figure([{"phase": "search", "step": 0, "accuracy": 1.0}], metric="spice")


@pytest.mark.parametrize("make", [lambda: kept_share_figure(shares(3)), lambda: history_figure(metrics())])
def test_figures_are_written_at_150_dpi_on_white_without_touching_the_backend(make: Any, tmp_path: Path) -> None:
    before = mpl.rcParams._get_backend_or_none()
    figure = make()
    save_figure(figure, tmp_path / "figure.png")
    assert mpl.rcParams._get_backend_or_none() == before
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == pytest.approx([150 * inches for inches in figure.get_size_inches()], abs=1)
        assert image.convert("RGB").getpixel((1, image.height - 2)) == (255, 255, 255)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def test_a_figure_that_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere"):
        save_figure(kept_share_figure(shares(1)), tmp_path / "nowhere" / "figure.png")
    folder = tmp_path / "figure.png"
    folder.mkdir()
    with pytest.raises(RunFolderError, match="a folder of that name"):
        save_figure(kept_share_figure(shares(1)), folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("odd", ["$x_$", "a $\\frac$ b", "\x1b[31m \u202e", "100 % _", "{}"])
def test_names_are_no_formulas(tmp_path: Path, odd: str) -> None:
    shares = [GroupShare(f"{odd}.{layer}.mlp", odd, "mlp", 8, 4) for layer in range(2)]
    save_figure(kept_share_figure(shares, odd), tmp_path / "kept.png")
    found = [{"phase": odd, "step": step, "split": odd, odd: 50.0} for step in (1, 2)]
    save_figure(history_figure(found, metric=odd, title=odd), tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size
