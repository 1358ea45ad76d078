"""A few held-out samples of a run, with images and the answers of every model.

A run keeps them in `examples/`: small images, and `examples.json`, which names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from upop.errors import DataError
from upop.plain import plain
from upop.reading import read_json
from upop.values import problems

FILE = "examples.json"
_LONGEST_SIDE = 384
_EXACT_SIDE = 128  # images up to here are kept to the pixel: drawn shapes would blur
_QUALITY = 85
_IMAGES = AliasChoices("images", "pictures")  # as files of earlier versions say it


def _plain(text: Any) -> Any:
    """Return a text that files and pages take: the name of a class may be a folder's, whose bytes may be anything."""
    return plain(text) if isinstance(text, str) else text


def _only_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        # A folder may come from elsewhere, and a report must not show other files of this machine.
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"images are named by files beside examples.json; found {name!r}")
    return names


Text = Annotated[str | None, BeforeValidator(_plain)]
ImageFiles = Annotated[tuple[str, ...], AfterValidator(_only_names)]


class Answer(BaseModel):
    """The true answer for a sample, or the answer of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Text = Field(default=None, description="as people read it")
    images: ImageFiles = Field(
        default=(), validation_alias=_IMAGES, description="files beside examples.json: what was found, or a map"
    )
    note: Text = Field(default=None, description="what else there is to say, in small print")
    right: bool | None = Field(default=None, description="None where an answer is not simply right or wrong")


class Example(BaseModel):
    """One sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: ImageFiles = Field(
        default=(), validation_alias=_IMAGES, description="what the models were shown; files beside examples.json"
    )
    prompt: Text = Field(default=None, description="the question, the sentence, the text that is looked for")
    truth: Answer | None = Field(default=None, description="None where the data has none")
    answers: Mapping[str, Answer] = Field(description="model -> its answer; names as in results.json")


class Examples(BaseModel):
    """The samples of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str = Field(description="its published name")
    about: str = Field(description="which samples these are")
    samples: tuple[Example, ...] = Field(validation_alias=AliasChoices("samples", "records"))

    def write(self, folder: Path) -> None:
        """Write examples.json into a folder that holds the images."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=1, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Examples:
        """Read examples of `write`.

        Raises:
            DataError: the file cannot be read, or does not hold examples.
        """
        path = folder / FILE
        content = read_json(path, DataError, "Restore it, or remove the folder.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise DataError(f"{path}: expected examples as a run writes them; {problems(error)[0]}.") from error


class Album:
    """Keeps the images of examples as small files in a folder, each once.

    Args:
        folder: where to write; it must be there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str] = {}

    def add(self, image: Image.Image, name: str) -> str:
        """Write an image and return its file name; a repeated name returns the earlier file.

        Args:
            image: of any size; the file's longest side has at most 384 pixels.
            name: identifies the image; letters, digits and dashes.
        """
        if name not in self._files:
            small = image.convert("RGB")
            small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            exact = max(small.size) <= _EXACT_SIDE
            self._files[name] = f"{name}.{'png' if exact else 'jpg'}"
            small.save(self._folder / self._files[name], quality=_QUALITY)
        return self._files[name]
