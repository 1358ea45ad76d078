"""How good captions are: the metrics of COCO captioning, as far as this machine has what they need.

pycocoevalcap (the extra "coco") computes what is published; its METEOR, SPICE and word splitter run on Java, and SPICE
needs models of 300 MB that the package fetches when asked to (`python -m pycocoevalcap.spice.get_stanford_models`).
Without the package, torchmetrics gives BLEU and ROUGE-L.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchmetrics.functional.text import bleu_score, rouge_score

from upop.data.shapes.reading import describes, read_scene
from upop.data.text import clean_caption
from upop.errors import DataError

HAS_COCO = find_spec("pycocoevalcap") is not None
"""Whether the published metrics can be computed."""
DECIDING = "cider" if HAS_COCO else "bleu4"

_BLEU = ("bleu1", "bleu2", "bleu3", "bleu4")
_NO_LIMIT = 10**6


def caption_scores(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Return the metrics of captions, in percent.

    Args:
        captions: by picture number.
        references: captions that people gave, by the same numbers.

    Returns:
        bleu1 to bleu4 and rouge_l; with pycocoevalcap cider, with Java meteor, with its models spice. For generated
        pictures also "exact": the share of captions that mention every shape, and say nothing false.
    """
    scores = _coco_scores(captions, references) if HAS_COCO else _plain_scores(captions, references)
    return scores | _exact_share(captions, references)


def _plain_scores(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    _say(
        "pycocoevalcap is not installed: captions are written, and scored by BLEU and ROUGE-L from torchmetrics alone. "
        'For CIDEr, METEOR and SPICE: pip install "upop[coco]", and Java.'
    )
    found = [_words(captions[number]) for number in captions]
    given = [[_words(text) for text in references[number]] for number in captions]
    scores = {name: float(bleu_score(found, given, n_gram=count + 1)) for count, name in enumerate(_BLEU)}
    scores["rouge_l"] = float(rouge_score(found, given, accumulate="best", rouge_keys="rougeL")["rougeL_fmeasure"])
    return {name: 100 * value for name, value in scores.items()}


def _coco_scores(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    java = shutil.which("java") is not None
    given, found = _split(references, java), _split({number: [text] for number, text in captions.items()}, java)
    given = {number: given[number] for number in found}

    def score(scorer: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # they print as they go
            return scorer.compute_score(given, found)[0]

    scores = dict(zip(_BLEU, score(Bleu(4)), strict=True)) | {"rouge_l": score(Rouge()), "cider": score(Cider())}
    for name, scorer in _java_scorers(java).items():
        try:
            scores[name] = score(scorer())
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            _say(f"{name} could not be computed ({type(error).__name__}: {error}); the other metrics are there.")
    return {name: 100 * float(value) for name, value in scores.items()}


def _java_scorers(java: bool) -> dict[str, Any]:
    if not java:
        _say("There is no Java here: METEOR and SPICE are left out, and words are split at spaces.")
        return {}
    from pycocoevalcap.meteor.meteor import Meteor

    scorers = {"meteor": Meteor}
    import pycocoevalcap.spice as spice

    if any(Path(next(iter(spice.__path__))).glob("lib/stanford-corenlp-*-models.jar")):
        from pycocoevalcap.spice.spice import Spice

        scorers["spice"] = Spice
    else:
        _say(
            "SPICE is left out, for its models are not installed. "
            "Fetch them: python -m pycocoevalcap.spice.get_stanford_models"
        )
    return scorers


def _split(texts: Mapping[int, Sequence[str]], java: bool) -> dict[int, list[str]]:
    """Return the texts with their words split off by single spaces, without punctuation."""
    if not java:
        return {number: [_words(text) for text in some] for number, some in texts.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    split: dict[int, list[str]] = PTBTokenizer().tokenize(
        {number: [{"caption": text} for text in some] for number, some in texts.items()}
    )
    return split


def _words(text: str) -> str:
    return clean_caption(text.replace(",", " "), _NO_LIMIT)


def _exact_share(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    try:
        for texts in references.values():
            read_scene(texts)
    except DataError:
        return {}  # no generated pictures: nothing tells what there is to see
    exact = sum(describes(text, references[number]) for number, text in captions.items())
    return {"exact": 100 * exact / len(captions)}


@cache
def _say(line: str) -> None:
    """Tell it once."""
    logging.getLogger("upop").warning(line)
