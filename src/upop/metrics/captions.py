"""Metrics of COCO captioning, as far as this machine has their dependencies.

pycocoevalcap (the extra "coco") computes the published metrics. Its METEOR, SPICE and tokenizer run on Java, and SPICE
needs models of 300 MB (`python -m pycocoevalcap.spice.get_stanford_models`). Without the package, torchmetrics computes
BLEU and ROUGE-L; its ROUGE-L weighs precision and recall equally.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from torchmetrics.functional.text import bleu_score, rouge_score

from upop.data.text import clean_caption

HAS_COCO = find_spec("pycocoevalcap") is not None
"""Whether pycocoevalcap is installed."""

Metric = Callable[[Mapping[int, str], Mapping[int, Sequence[str]]], dict[str, float]]
"""(image -> caption, image -> references) -> metric -> value; {} for data that it does not apply to."""

_Texts = dict[int, list[str]]
REGISTERED: list[Metric] = []
"""What `register_metric` was given."""
_BLEU = ("bleu1", "bleu2", "bleu3", "bleu4")
_NO_LIMIT = 10**6


def caption_scores(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Return the metrics of captions, in percent.

    Args:
        captions: number of an image -> generated caption.
        references: number of an image -> its reference captions.

    Returns:
        bleu1 to bleu4 and rouge_l; with pycocoevalcap cider, with Java meteor, with its models spice; and those of
        `register_metric`.
    """
    scores = _coco_scores(captions, references) if HAS_COCO else _plain_scores(captions, references)
    for metric in REGISTERED:
        scores |= metric(captions, references)
    return scores


def register_metric(metric: Metric) -> None:
    """Add a metric to `caption_scores`; registering it again has no effect."""
    if metric not in REGISTERED:
        REGISTERED.append(metric)


def deciding_metric() -> str:
    """Return the metric that selects the best checkpoint: CIDEr, or BLEU-4 without pycocoevalcap or Java."""
    return "cider" if HAS_COCO and _has_java() else "bleu4"


def _plain_scores(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    warn_once(
        "pycocoevalcap is not installed: captions are scored by BLEU and ROUGE-L alone, from torchmetrics. For CIDEr, "
        'METEOR and SPICE, install Java and pip install "upop[coco]".'
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

    found, given = _split(captions, references)
    scores: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        scores |= zip(_BLEU, Bleu(4).compute_score(given, found)[0], strict=True)
        scores["rouge_l"] = Rouge().compute_score(given, found)[0]
        scores["cider"] = Cider().compute_score(given, found)[0]
        for name, score in _java_scorers().items():
            try:
                scores[name] = score(given, found)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                warn_once(
                    f"{name} could not be computed ({type(error).__name__}: {error}) and is left out. Check that Java "
                    "1.8 or later runs (java -version)."
                )
    return {name: 100 * float(value) for name, value in scores.items()}


def _java_scorers() -> dict[str, Callable[[_Texts, _Texts], float]]:
    if not _has_java():
        warn_once("Java is not installed: METEOR and SPICE are left out, and words are split at spaces. Install Java.")
        return {}
    from pycocoevalcap.spice.get_stanford_models import JAR, SPICEDIR, SPICELIB

    # Without both files the package would download them in the middle of a run.
    if all(Path(SPICEDIR, SPICELIB, f"{JAR}{part}.jar").is_file() for part in ("", "-models")):
        return {"meteor": _meteor, "spice": _spice}
    warn_once(
        "SPICE is left out, because its models are not installed. "
        "Download them: python -m pycocoevalcap.spice.get_stanford_models"
    )
    return {"meteor": _meteor}


def _meteor(given: _Texts, found: _Texts) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        score: float = scorer.compute_score(given, found)[0]
    finally:
        # It leaves pipes open, and after a failure its destructor would wait for its own lock forever.
        for pipe in (scorer.meteor_p.stdin, scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
        if scorer.lock.locked():
            scorer.lock.release()
    return score


def _spice(given: _Texts, found: _Texts) -> float:
    from pycocoevalcap.spice.spice import Spice

    score: float = Spice().compute_score(given, found)[0]
    return score


def _split(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> tuple[_Texts, _Texts]:
    """Return tokenized captions and references: words separated by single spaces, without punctuation."""
    # The tokenizer expects one text per line.
    texts = [" ".join(text.split()) for number in captions for text in (captions[number], *references[number])]
    words = iter(_java_words(texts) or map(_words, texts))
    found: _Texts = {}
    given: _Texts = {}
    for number in captions:
        found[number] = [next(words)]
        given[number] = [next(words) for _ in references[number]]
    return found, given


def _java_words(texts: Sequence[str]) -> list[str] | None:
    """Return the texts tokenized by the published tokenizer; None if it does not run."""
    if not _has_java():
        return None
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    problem = "some texts did not come back"
    try:
        split = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
        if len(split) == len(texts):
            return [split[number][0] for number in range(len(texts))]
    except OSError as error:  # it writes to its package folder, which may be read-only
        problem = str(error)
    warn_once(
        f"The tokenizer of pycocoevalcap failed ({problem}): words are split at spaces, and scores differ slightly."
    )
    return None


def _has_java() -> bool:
    return shutil.which("java") is not None


def _words(text: str) -> str:
    return clean_caption(text.replace(",", " "), _NO_LIMIT)


@cache
def warn_once(line: str) -> None:
    """Log a warning, once per line."""
    logging.getLogger("upop").warning(line)
