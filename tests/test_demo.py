"""The model that the repository carries: it loads, and it fits the configuration and the vocabulary of the demo."""

from __future__ import annotations

from pathlib import Path

import upop
from upop.cli.demo import CONFIG, DENSE
from upop.data.shapes.vocabulary import vocabulary
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
