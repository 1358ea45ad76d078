"""Run folders written by hand, and what a browser would make of a page: for the tests of reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from upop.examples import Album, Answer, Example, Examples
from upop.report.results import ModelResult, Results

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'and' </style> {{ 7 * 7 }}"
PAPER = "https://arxiv.org/abs/2301.13741"
_EMPTY = {"meta", "img", "br", "hr", "link", "input"}
_ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href", "formaction", "cite"}


class Page(HTMLParser):
    """A page taken apart; wrong nesting is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All that is read, on one line."""
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def numbers(self) -> list[float]:
        """The exact numbers of the table of results."""
        return [float(str(attributes["value"])) for attributes in self.named("data")]

    def addresses(self) -> Iterator[str]:
        """All that a browser might fetch, or lead to."""
        for _, attributes in self.tags:
            yield from (value or "" for name, value in attributes.items() if name in _ADDRESSES)


def check_alone(page: Page) -> None:
    """Nothing of a page comes from elsewhere, and nothing in it runs."""
    assert set(page.addresses()) - {PAPER} == {
        address for address in page.addresses() if address.startswith("data:image/")
    }
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(found["content"] for found in page.named("meta") if "http-equiv" in found)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def results(name: str = "UPop 2x", **changes: Any) -> Results:
    """Results of a dense and a compressed model."""
    dense = ModelResult(
        name="dense",
        metrics={"dev": {"accuracy": 82.31}, "test": {"accuracy": 83.08}},
        parameters=259_500_000,
        gmacs=132.5,
        latency_ms=2000.0,
    )
    small = ModelResult(
        name=name,
        metrics={"dev": {"accuracy": 80.52}, "test": {"accuracy": 81.18}},
        parameters=150_200_000,
        gmacs=89.4,
        latency_ms=1250.0,
    )
    about = {"cpu": "Some CPU", "device": "Some CPU", "cores": 2, "threads": 1, "torch": "2.15.0+cpu", "python": "3"}
    return Results(**{"models": (dense, small), "batch_size": 4, "machine": about, **changes})


def layout(layers: int = 3) -> dict[str, Any]:
    """What upop.json says of the groups of a compressed model of two modalities."""
    groups: dict[str, Any] = {}
    for layer in range(layers):
        for tower, modality in (("visual", "vision"), ("words", "text")):
            for kind, size in (("attention", 32), ("mlp", 96)):
                kept = 1 + (7 * layer + size // 3) % size
                groups[f"{tower}.blocks.{layer}.{kind}"] = {
                    "kind": kind,
                    "modality": modality,
                    "heads": None,
                    "channels": kept,
                    "of": size,
                }
    return groups


def rows(steps: int = 60) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a search and of retraining."""
    found: list[dict[str, Any]] = []
    for step in range(1, 2 * steps + 1):
        phase = "search" if step <= steps else "retrain"
        row: dict[str, Any] = {"phase": phase, "epoch": 0, "step": step, "loss": 3 / step, "lr": 1e-4, "seconds": step}
        if phase == "search":
            kept = 1 - step / steps / 2
            row |= {"ratio": step / steps / 2, "kept": {"vision": kept, "text": kept**2}}
        found.append(row)
        if step % steps == 0:
            value = 80.0 if phase == "search" else 80.52
            found.append({"phase": phase, "epoch": 0, "step": step, "split": "dev", "accuracy": value})
    return found


def write_run(folder: Path, found: Results | None = None, *, example: Example | None = None, **settings: Any) -> Path:
    """Write the folder of a compression run that ended; return it."""
    (folder / "best").mkdir(parents=True)
    values = {"pretrained": "some/dense", "p": 0.5, "output_dir": str(folder), "model": {"depth": 3}, **settings}
    (folder / "settings.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    versions = {
        "task": "nlvr",
        "verb": "compress",
        "command": "upop compress nlvr --p 0.5",
        "python": "3.11.7",
        "libraries": {"upop": "0.1.0", "torch": "2.15.0"},
    }
    (folder / "versions.json").write_text(json.dumps(versions))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "best" / "upop.json").write_text(json.dumps({"layout": layout()}))
    (found or results()).write_json(folder / "results.json")
    (folder / "examples").mkdir()
    album = Album(folder / "examples")
    image = album.add(Image.new("RGB", (40, 30), "#3366cc"), "3-0")
    model = (found or results()).models[-1].name
    shown = example or Example(
        images=(image,),
        prompt="is it blue?",
        truth=Answer(text="yes", note="9 of 10 people"),
        answers={"dense": Answer(text="yes", right=True), model: Answer(text="no", right=False)},
    )
    Examples(split="test", about="1 of the 7 samples of the test split.", samples=(shown,)).write(folder / "examples")
    return folder
