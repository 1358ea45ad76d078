"""The page of a run: complete, alone, and true to the files that it is made of."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from report.pages import HOSTILE, Page, check_alone, layout, results, rows, write_run
from upop.errors import DataError, SettingError
from upop.examples import Answer, Example
from upop.report.page import comparison_page, distinct_names, ink, run_page, write_run_page
from upop.report.results import Results
from upop.report.run import read_run

STYLE = Path(__file__).parents[2] / "src" / "upop" / "report" / "templates" / "style.css"


def page_of(folder: Path) -> Page:
    return Page(run_page(read_run(folder)))


def test_the_page_is_alone_and_shows_the_numbers_of_the_results(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    check_alone(page)
    expected = [
        value
        for model in results().models
        for value in (
            *(found for split in model.metrics.values() for found in split.values()),
            model.parameters / 1e6,
            model.gmacs,
            model.latency_ms,
        )
    ]
    assert page.numbers == expected
    for shown in ("81.2", "-1.9", "1.73x smaller", "1.48x fewer", "1.60x faster", "alternately, batch 4, Some CPU"):
        assert shown in page.text
    assert "test accuracy 81.2 % dense 83.1, -1.9 points" in page.text
    assert not page_notes(page)


def page_notes(page: Page) -> list[str]:
    return [attributes["class"] or "" for attributes in page.named("ul") if "notes" in (attributes["class"] or "")]


def test_a_cell_per_group_says_what_it_keeps(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    cells = [attributes for attributes in page.named("td") if "--kept" in (attributes.get("style") or "")]
    assert len(cells) == len(layout())
    for name, group in layout().items():
        (cell,) = (cell for cell in cells if f"({name})" in (cell["title"] or ""))
        assert f"keeps {group['channels']} of {group['of']} " in (cell["title"] or "")
        assert cell["style"] == f"--kept: {100 * group['channels'] / group['of']:.0f}%"
    shares = {
        modality: sum(group["channels"] for group in layout().values() if group["modality"] == modality)
        / sum(group["of"] for group in layout().values() if group["modality"] == modality)
        for modality in ("vision", "text")
    }
    for modality, share in shares.items():
        assert f"{modality} keeps {100 * share:.0f} % of 384 channels" in page.text


def test_curves_settings_versions_examples_and_the_command_are_there(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    shown_plots = plots(page)
    assert [plot.partition(".")[0] for plot in shown_plots] == [
        "On the dev split (%)",
        "Kept during the search (%)",
        "Training loss; up to 3, clipped at 0",  # a full stop: 0.9...
        "Learning rate",
    ]
    assert "accuracy: from 80 to 80.5" in shown_plots[0]
    assert "accuracy, dense model: from 82.3 to 82.3" in shown_plots[0]
    assert "vision: from 99.2 to 50; text: from 98.3 to 25" in shown_plots[1]
    for shown in ("upop compress nlvr --p 0.5", "2.15.0+cpu", "Some CPU", "some/dense", "depth 3", "is it blue?"):
        assert shown in page.text
    assert "yes 9 of 10 people dense yes ✓ right UPop 2x no ✗ wrong" in page.text
    assert len(page.named("img")) == 1
    assert (page.named("img")[0]["width"], page.named("img")[0]["height"]) == ("40", "30")


def test_losses_of_evaluations_are_in_no_curve_of_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    weighed = [{**row, "loss": 1e3, "perplexity": 1e4} if "split" in row else row for row in rows()]
    before = plots(page_of(folder))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighed))
    assert weighed != rows() and plots(page_of(folder)) == before


def plots(page: Page) -> list[str]:
    return [attributes["aria-label"] or "" for attributes in page.named("div") if attributes.get("role") == "img"]


def test_texts_from_elsewhere_are_texts(tmp_path: Path) -> None:
    example = Example(
        images=("3-0.png",),
        prompt=HOSTILE,
        truth=Answer(text=HOSTILE, note=HOSTILE),
        answers={HOSTILE: Answer(text=HOSTILE, right=False)},
    )
    folder = write_run(tmp_path / "<b>run", results(name=HOSTILE), example=example, pretrained=HOSTILE)
    versions = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_text(json.dumps({**versions, "command": HOSTILE, "task": HOSTILE}))
    named = {name.replace("visual", "<i>visual"): group for name, group in layout().items()}
    (folder / "best" / "upop.json").write_text(json.dumps({"layout": named}))
    odd = [{**row, "phase": HOSTILE} for row in rows()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    page = page_of(folder)
    check_alone(page)
    assert page.text.count(HOSTILE) >= 6
    assert "<script" not in page.html
    assert not page.named("b") or all(not attributes for attributes in page.named("b"))  # names of phases
    assert not page.named("i") or "visual" not in {str(attributes) for attributes in page.named("i")}
    check_alone(Page(comparison_page([read_run(folder), read_run(folder)])))


def _emptied(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (
            ["results.json"],
            "The run has not ended: there is no results.json yet. Its last row is from",
        ),
        (
            ["results.json", "best/upop.json", "examples/examples.json"],
            "there is no compressed model in best/ or last/",
        ),
        (["metrics.jsonl"], "so there are no curves"),
        (["examples/examples.json"], "There are no examples"),
        (["versions.json"], "versions.json is missing"),
        (["settings.yaml"], "settings.yaml is missing"),
        (
            ["results.json", "best/upop.json", "metrics.jsonl", "examples/examples.json", "settings.yaml"],
            "The run has not ended",
        ),
    ],
)
def test_a_page_without_a_piece_says_what_is_not_there(tmp_path: Path, pieces: list[str], said: str) -> None:
    folder = write_run(tmp_path / "run")
    for piece in pieces:
        (folder / piece).unlink()
    page = page_of(folder)
    check_alone(page)
    assert said in page.text
    assert page_notes(page)


def test_a_run_that_can_go_on_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "results.json").unlink()
    assert "--resume" not in page_of(folder).text
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000012.pt").write_bytes(b"")
    assert "resumes it with --resume" in page_of(folder).text


def test_a_row_that_is_being_written_and_a_missing_image_do_no_harm(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "retrain", "step": 12')
    (folder / "examples" / "3-0.png").unlink()
    page = page_of(folder)
    assert "left out: 1." in page.text
    assert "3-0.png is missing" in page.text


def test_other_files_of_the_machine_are_not_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "examples" / "examples.json"
    for name in ("../best/upop.json", "/etc/hostname", "..\\x.png"):
        file.write_text(json.dumps({"split": "s", "about": "a", "records": [{"pictures": [name], "answers": {}}]}))
        with pytest.raises(DataError, match="named by files beside"):
            read_run(folder)


@pytest.mark.parametrize("name", ["results.json", "versions.json", "best/upop.json", "examples/examples.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"a": ' * 2000, "\xff\xfe[", '{"a": 1, "a": 2}', "\0"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=re.escape(name.rpartition("/")[2])):
        read_run(folder)


_MANY = "".join(
    f"{new}: &{new} {{{', '.join(f'k{n}: *{old}' for n in range(9))}}}\n" for old, new in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "a: " + "[" * 3000, f"a: &a {{x: 1}}\n{_MANY}", "a: &a [*a]", "a: 1\na: 2"]
)
def test_a_page_does_without_settings_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "settings.yaml").write_text(text)
    page = page_of(folder)
    check_alone(page)
    assert "The settings are unknown." in page.text
    assert str(folder / "settings.yaml") in page.text


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"phase": "search", "step": 1' + "0" * 400 + "}", "\xff", "x" * 2**21]
)
def test_a_line_of_metrics_that_cannot_be_read_is_left_out(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(f"{line}\n")
    assert "are left out: 1." in page_of(folder).text


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("versions.json", {"libraries": ["a"]}, "libraries: Input should be a valid"),
        ("versions.json", {"verb": None}, "verb: Input should be a valid string"),
        ("best/upop.json", {"layout": {"a": {"kind": "x", "modality": "m", "channels": 1, "of": 2}}}, "layout.a.kind"),
        ("best/upop.json", {"layout": {"a": {"kind": "mlp", "modality": "m", "channels": 1, "of": 0}}}, "layout.a.of"),
        ("best/upop.json", {"layout": 3}, "layout: Input should be"),
    ],
)
def test_a_field_that_is_something_else_is_named(tmp_path: Path, name: str, change: dict[str, Any], said: str) -> None:
    folder = write_run(tmp_path / "run")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match=re.escape(said)):
        read_run(folder)


@pytest.mark.parametrize(
    "change", [{"kept": None}, {"kept": {"vision": "x"}}, {"ratio": {}}, {"step": "3"}, {"phase": 1}, {"average": [1]}]
)
def test_rows_that_hold_something_else_are_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run")
    found = rows()
    found[5] |= change
    found[6] = {"about": "something else"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    page = page_of(folder)
    check_alone(page)
    assert "are left out: 1." in page.text


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder.parent / "rum", r"it does not exist \(did you mean 'run'\?\)"),
        (lambda folder: folder / "best", "but part of the run"),
        (lambda folder: folder.parent, "but it holds runs: .*run.* --compare"),
        (lambda folder: folder / "settings.yaml", "it is a file"),
        (lambda folder: folder / "empty", "it is empty. A run writes settings.yaml and versions.json"),
        (lambda folder: folder / "other", "it holds a.txt, b.txt. A run writes"),
    ],
)
def test_a_folder_that_is_no_run_is_told_apart(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    folder = write_run(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "empty").mkdir(parents=True)
    (elsewhere / "other").mkdir()
    for name in ("a.txt", "b.txt"):
        (elsewhere / "other" / name).write_text("")
    asked = make(folder)
    asked = elsewhere / asked.name if asked.name in ("empty", "other") else asked
    with pytest.raises(DataError, match=said):
        read_run(asked)


def test_the_page_is_written_whole_and_again(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    to = tmp_path / "new" / "page.html"
    for _ in range(2):
        write_run_page(run, to)
        assert to.read_text(encoding="utf-8") == run_page(run)
    assert list(to.parent.iterdir()) == [to]


def test_several_runs_are_put_side_by_side(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "2x", p=0.5, output_dir="one")
    second = write_run(tmp_path / "b" / "2x", results(name="magnitude 2x"), p=0.5, method="magnitude", output_dir="two")
    unfinished = write_run(tmp_path / "c", p=0.75)
    (unfinished / "results.json").unlink()
    runs = [read_run(path) for path in (first, second, unfinished)]
    assert distinct_names(runs[:2]) == ["a/2x", "b/2x"]
    page = Page(comparison_page(runs))
    check_alone(page)
    # The dense model is the same, and comes once.
    assert len(page.numbers) == 5 * 3
    assert "dense a/2x, b/2x" in page.text
    assert "c: The run has not ended" in page.text
    differing = page.text.partition("Settings that differ")[2].partition("Commands")[0]
    assert "p 0.5 0.5 0.75" in differing
    assert "method - magnitude -" in differing
    assert "output_dir" not in differing
    assert "pretrained" not in differing
    shown_plots = plots(page)
    assert "test accuracy (%) over parameters (M)" in shown_plots[0]
    assert "a/2x: from 81.2 to 83.1" in shown_plots[0]
    # Samples that all runs show come once, with the answers of all.
    assert page.text.count("is it blue?") == 1
    assert "magnitude 2x no ✗ wrong" in page.text


def test_one_run_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="at least two runs; found 1"):
        comparison_page([read_run(write_run(tmp_path / "run"))])


Colour = tuple[float, ...]


def _themes() -> dict[str, dict[str, Colour]]:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)[:2]

    def colours(block: str) -> dict[str, Colour]:
        found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", block)
        return {name: tuple(int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)) for name, value in found}

    return {"light": colours(light), "dark": colours(light) | colours(dark)}


def _contrast(first: Colour, second: Colour) -> float:
    def luminance(colour: Colour) -> float:
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_are_read_easily_in_both_themes(theme: str) -> None:
    """WCAG asks for a contrast of 4.5."""
    colours = _themes()[theme]
    for name in ("ink", "quiet", "good", "bad", "accent", "vision", "text", "other", *(f"run{n}" for n in range(6))):
        for ground in ("paper", "card", "wash"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    turned = {"light": "deep", "dark": "bright"}[theme]
    for hue in ("vision", "text", "other"):
        for percent in range(101):
            share = percent / 100
            mixed = tuple(
                share * one + (1 - share) * other for one, other in zip(colours[hue], colours["empty"], strict=True)
            )
            letters = colours["high" if turned in ink(share).split() else "low"]
            assert _contrast(letters, mixed) >= 4.5, (hue, percent)


SEEN = "\x1b]8;;http://a\x07[/] [bold]x \u202eabc\u2069 \udcff\x85"
WRITTEN = r"\x1b]8;;http://a\x07[/] [bold]x \u202eabc\u2069 \udcff\x85"


def test_what_is_no_letter_is_written_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results(name=SEEN.replace("\udcff", "")), note=SEEN)
    found = rows()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**row, "phase": SEEN}) + "\n" for row in found))
    versions = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_text(json.dumps({**versions, "command": SEEN.replace("\udcff", "")}))
    for html in (run_page(read_run(folder)), comparison_page([read_run(folder), read_run(folder)])):
        html.encode()
        assert not set(SEEN) & set(html) & set("\x1b\x07\u202e\u2069\udcff\x85")
        check_alone(Page(html))
    assert WRITTEN.replace(r"\udcff", "") in html
    assert WRITTEN in run_page(read_run(folder))  # of the settings, and of the phases


def test_a_image_that_is_a_link_or_a_pipe_is_not_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    place = folder / "examples" / "3-0.png"
    elsewhere = place.rename(tmp_path / "mine.png")
    place.symlink_to(elsewhere)
    assert "3-0.png is missing" in page_of(folder).text
    place.unlink()
    os.mkfifo(place)
    assert "3-0.png is missing" in page_of(folder).text


def timed(name: str, dense: float, small: float, **changes: Any) -> Results:
    found = results(name)
    models = zip(found.models, (dense, small), strict=True)
    return results(models=[model.model_copy(update={"latency_ms": time}) for model, time in models], **changes)


def test_every_run_has_the_latency_of_its_own_dense_model(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", timed("UPop 2x", 2000, 1250))
    second = write_run(tmp_path / "b", timed("UPop 4x", 1600, 2000, batch_size=8))
    page = Page(comparison_page([read_run(first), read_run(second)]))
    assert len(page.numbers) == 5 * 4
    assert "dense a 82.3 83.1 259.5 132.5 2,000" in page.text
    assert "dense b 82.3 83.1 259.5 132.5 1,600" in page.text
    assert "2,000 1.25x slower" in page.text and "1,250 1.60x faster" in page.text
    assert "0.80" not in page.text
    assert "a: Latency: median, measured alternately, batch 4" in page.text
    assert "b: Latency: median, measured alternately, batch 8" in page.text


def test_a_tile_says_slower_where_it_is_slower(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", timed("UPop 2x", 1600, 2000))).text
    assert "slower 1.25\N{MULTIPLICATION SIGN} 1,600 \N{RIGHTWARDS ARROW} 2,000 ms" in text
    assert "fewer multiply-adds 1.48\N{MULTIPLICATION SIGN}" in text
    same = page_of(write_run(tmp_path / "same", timed("UPop 2x", 2000, 2000))).text
    assert "latency 2,000 ms 2,000 \N{RIGHTWARDS ARROW} 2,000 ms" in same


def test_runs_without_a_compressed_model_are_compared_with_none(tmp_path: Path) -> None:
    dense = Results(models=results().models[:1])
    runs = [read_run(write_run(tmp_path / name, dense)) for name in ("a", "b")]
    text = Page(comparison_page(runs)).text
    assert "change from the dense model" not in text
    assert "connects a run's compressed model" not in text
    both = Page(comparison_page([runs[0], read_run(write_run(tmp_path / "c"))])).text
    assert "from the dense model" in both
    assert "connects a run's compressed model" in both
