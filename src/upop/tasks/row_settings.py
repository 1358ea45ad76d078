"""Settings of the tasks whose data are rows of files or of data sets on the hub, and the rows that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from upop.data.columns import ROLES
from upop.data.rows import Rows, read_rows
from upop.errors import DataError, SettingError, nearest
from upop.settings import RunSettings

MOST_HELD_OUT = 1000
"""Rows that are held out of the training data where no others are named."""

S = TypeVar("S", bound="RowSettings")


class RowSettings(RunSettings):
    """Settings that say which rows are trained on and evaluated on, and which of their columns is what."""

    data: str | None = Field(
        None,
        description="rows to train on: a .json, .jsonl, .parquet, .csv or .tar file, a pattern of such files, a folder "
        "of images, or a name on the hub",
    )
    data_name: str | None = Field(None, description="configuration of a data set on the hub")
    data_split: str | None = Field(
        None, description="split to train on, of a data set with several; train if not given"
    )
    val_data: str | None = Field(
        None, description="validation rows, which select the best epoch; by default `hold_out`"
    )
    val_split: str | None = Field(None, description="their split; without val_data a split of `data`")
    test_data: str | None = Field(None, description="test rows, for the final table")
    test_split: str | None = Field(None, description="their split; without test_data a split of `data`")
    hold_out: float = Field(
        0.05, ge=0, lt=1, description=f"share of `data` that is val where none is named; {MOST_HELD_OUT} rows at most"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="which column is what, where it has no usual name: answer: reply"
    )
    image_root: Path | None = Field(
        None, description="where paths of images start; the folder of the file if not given"
    )
    rows: int | None = Field(None, ge=1, description="use only the first rows of `data`")
    streaming: bool = Field(False, description="take the first `rows` rows without fetching the others")

    include: tuple[str, ...] = Field(
        (), description="what may be pruned: vision, text, projector, or patterns of groups; all if not given"
    )
    exclude: tuple[str, ...] = Field((), description="patterns of groups that stay whole")
    samples: int = Field(128, ge=1, description="training samples that method one-shot, and upop prune, rank by")
    lora: int | None = Field(
        None, ge=1, description="recover by adapters of this rank beside frozen weights, merged at the end (peft)"
    )

    @model_validator(mode="after")
    def _adapts_what_is_cut(self) -> Self:
        if self.lora is not None and self.method not in ("one-shot", "magnitude"):
            raise ValueError(
                f"lora ({self.lora}) trains beside weights that are frozen, and method {self.method} searches while it "
                "trains them. Take method: one-shot, which cuts first"
            )
        if self.method == "magnitude" and (self.include or self.exclude):
            raise ValueError("method: magnitude takes neither include nor exclude; method: one-shot does")
        if self.lora is not None and self.ema_decay is not None:
            raise ValueError("lora and ema_decay are both given; leave ema_decay out")
        return self

    @field_validator("columns", mode="before")
    @classmethod
    def _are_roles(cls, value: Any) -> Any:
        for role in value if isinstance(value, dict) else ():
            if role not in ROLES:
                raise ValueError(
                    f"{role!r} is nothing that a column can be{nearest(str(role), list(ROLES))}; known are "
                    f"{', '.join(ROLES)}"
                )
        return value

    @model_validator(mode="after")
    def _streams_so_many(self) -> Self:
        if self.streaming and self.rows is None:
            raise ValueError("streaming is asked for without rows, which says how many to take (--rows 20000)")
        return self

    @property
    def data_folders(self) -> dict[str, Path]:
        """Setting -> folder: none, what rows lack is told of each."""
        return {}

    def place(self, split: str) -> tuple[str | None, str | None]:
        """Return where the rows of "train", "val" or "test" are from, and their split; None where none are named."""
        if split == "train":
            return self.data, self.data_split
        data, part = getattr(self, f"{split}_data"), getattr(self, f"{split}_split")
        return (data, part) if data is not None or part is None else (self.data, part)

    @property
    def held_out(self) -> tuple[str, ...]:
        """The splits that are evaluated."""
        val = self.place("val")[0] is not None or (self.data is not None and self.hold_out > 0)
        return (*(("val",) if val else ()), *(("test",) if self.place("test")[0] is not None else ()))

    def as_evaluated(self) -> Self:
        """Return the settings of an evaluation: where only `data` is given, all its rows are the test."""
        if self.data is None or self.place("val")[0] is not None or self.place("test")[0] is not None:
            return self
        return self.model_copy(
            update={"data": None, "data_split": None, "test_data": self.data, "test_split": self.data_split}
        )


def rows_for(settings: RowSettings, split: str, kinds: Sequence[str], classes: Sequence[str] = ()) -> Rows:
    """Return the rows of a split, checked.

    Args:
        settings: which say where they are.
        split: "train", "val" or "test".
        kinds: of samples that will do, of `upop.data.columns.KINDS`.
        classes: names that labels are numbers of; those of the data if not given.

    Raises:
        SettingError: no data were named.
        DataError: they cannot be read, or a row is wrong.
    """
    source, part = settings.place(split)
    shared = settings.place("val")[0] is None and settings.hold_out > 0  # val is a share of the training data
    if shared and split == "val":
        source, part = settings.place("train")
    if source is None:
        raise SettingError(
            f"The rows to {'train on' if split == 'train' else 'evaluate on'} are needed, and none are named. Give "
            "--data FILE: .jsonl, .json, .parquet, .csv, .tar, a folder of images, or a name on the hub."
        )
    whole = read_rows(
        source,
        kinds=kinds,
        columns=settings.columns,
        image_root=settings.image_root,
        split=part,
        name=settings.data_name if source == settings.data else None,
        classes=classes,
        outside=settings.allow_outside,
        streaming=settings.streaming,
        limit=settings.rows if settings.streaming or source == settings.data else None,
    )
    if not shared or split == "test":
        return whole
    held = _held_out(len(whole), settings.hold_out)
    if len(held) == len(whole):
        raise DataError(
            f"{settings.data} holds {len(whole)} rows, too few to hold any out. Name others to evaluate on with "
            "--val-data FILE."
        )
    if split == "train":
        return whole.without(set(held))
    found = whole.of(held)
    found.notes = [f"No val data are named: every {len(whole) // len(held)}th row of {settings.data} is held out"]
    return found


def _held_out(count: int, share: float) -> list[int]:
    """Return the rows that are held out, at even distances."""
    number = min(max(1, round(share * count)), MOST_HELD_OUT)
    return [place * count // number for place in range(number)]
