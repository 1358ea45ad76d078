"""The model that the repository carries: it loads, and it fits the configuration and the vocabulary of the demo."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

import upop
from upop.cli.demo import CONFIG, DENSE, answers_table
from upop.demo.vocabulary import vocabulary
from upop.examples import Answer, Example, Examples
from upop.models.nlvr import BlipNlvr
from upop.settings import read_settings
from upop.tasks.nlvr import NlvrSettings

ROOT = Path(__file__).parents[1]


def test_the_carried_model_fits_the_demo() -> None:
    model = upop.load(ROOT / DENSE)
    settings = read_settings(NlvrSettings, ROOT / CONFIG, {})
    assert isinstance(model, BlipNlvr)
    assert {name: getattr(model.config, name) for name in settings.model} == settings.model
    assert model.config.image_size == settings.image_size
    # [DEC] and [ENC] are added to the generated vocabulary.
    assert model.config.vocab_size == len(vocabulary()) + 2


def test_the_table_of_answers_marks_the_wrong_ones() -> None:
    sample = Example(
        prompt="there is a [red] circle",
        truth=Answer(text="True"),
        answers={"dense": Answer(text="True", right=True), "UPop 2x": Answer(text="False", right=False)},
    )
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    console.print(answers_table(Examples(split="test", about="", samples=(sample,))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red] circle" in text
    assert "\x1b[31mFalse" in text
    assert "\x1b[31mTrue" not in text
