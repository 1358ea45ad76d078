"""Settings of the tasks whose data are rows of files or of data sets on the hub, and the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from upop.data.columns import ROLES
from upop.data.rows import Rows, read_rows
from upop.errors import DataError, SettingError, nearest
from upop.runs.examples import spread
from upop.settings import RunSettings

MOST_HELD_OUT = 1000
"""Most rows to hold out of the training data, if no validation data are given."""

S = TypeVar("S", bound="RowSettings")


class RowSettings(RunSettings):
    """Settings that choose the rows for training and evaluation, and the roles of their columns."""

    data: str | None = Field(
        None,
        description="training rows: a .json, .jsonl, .parquet, .csv or .tar file, a pattern of such files, a folder of "
        "images, or a name on the hub",
    )
    data_name: str | None = Field(None, description="configuration of a data set on the hub")
    data_split: str | None = Field(None, description="training split of a data set with several; by default train")
    val_data: str | None = Field(
        None, description="validation rows, which select the best epoch; by default a share of `data` (hold_out)"
    )
    val_split: str | None = Field(None, description="split of val_data, or of `data` without val_data")
    test_data: str | None = Field(None, description="test rows, for the final table")
    test_split: str | None = Field(None, description="split of test_data, or of `data` without test_data")
    hold_out: float = Field(
        0.05, ge=0, lt=1, description=f"share of `data` for validation, if none are given; at most {MOST_HELD_OUT} rows"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="role -> column, for columns without a usual name: answer: reply"
    )
    image_root: Path | None = Field(
        None, description="folder that image paths are relative to; by default the folder of the file"
    )
    rows: int | None = Field(None, ge=1, description="use only the first rows of `data`")
    streaming: bool = Field(False, description="read the first `rows` rows without downloading the others")

    include: tuple[str, ...] = Field(
        (), description="groups to prune: vision, text, projector, or patterns of names; by default all"
    )
    exclude: tuple[str, ...] = Field((), description="patterns of groups not to prune")
    samples: int = Field(128, ge=1, description="calibration samples of method one-shot and of upop prune")
    lora: int | None = Field(
        None, ge=1, description="recover with LoRA adapters of this rank beside frozen weights, merged at the end"
    )

    @model_validator(mode="after")
    def _adapts_what_is_cut(self) -> Self:
        if self.lora is not None and self.method not in ("one-shot", "magnitude"):
            raise ValueError(
                f"lora ({self.lora}) freezes the weights, and method {self.method} searches while it trains them. Use "
                "method: one-shot, which cuts first"
            )
        if self.method == "magnitude" and (self.include or self.exclude):
            raise ValueError("method: magnitude takes neither include nor exclude; method: one-shot does")
        if self.lora is not None and self.ema_decay is not None:
            raise ValueError("lora and ema_decay do not go together; leave ema_decay out")
        return self

    @field_validator("columns", mode="before")
    @classmethod
    def _are_roles(cls, value: Any) -> Any:
        for role in value if isinstance(value, dict) else ():
            if role not in ROLES:
                raise ValueError(
                    f"{role!r} is not a role of a column{nearest(str(role), list(ROLES))}; known are {', '.join(ROLES)}"
                )
        return value

    @model_validator(mode="after")
    def _streams_so_many(self) -> Self:
        if self.streaming and self.rows is None:
            raise ValueError("streaming needs rows, the number of rows to read (--rows 20000)")
        return self

    @property
    def data_folders(self) -> dict[str, Path]:
        """Setting -> folder: none, because errors about rows name their files."""
        return {}

    def source(self, split: str) -> tuple[str | None, str | None]:
        """Return the data set of "train", "val" or "test", and its split; None if none is given."""
        if split == "train":
            return self.data, self.data_split
        data, part = getattr(self, f"{split}_data"), getattr(self, f"{split}_split")
        return (data, part) if data is not None or part is None else (self.data, part)

    @property
    def held_out(self) -> tuple[str, ...]:
        """The splits to evaluate, of "val" and "test"."""
        val = self.source("val")[0] is not None or (self.data is not None and self.hold_out > 0)
        return (*(("val",) if val else ()), *(("test",) if self.source("test")[0] is not None else ()))

    def as_evaluated(self) -> Self:
        """Return the settings of an evaluation; if only `data` is given, all its rows are the test split."""
        if self.data is None or self.source("val")[0] is not None or self.source("test")[0] is not None:
            return self
        return self.model_copy(
            update={"data": None, "data_split": None, "test_data": self.data, "test_split": self.data_split}
        )


def rows_for(settings: RowSettings, split: str, kinds: Sequence[str], classes: Sequence[str] = ()) -> Rows:
    """Return the checked rows of a split.

    Args:
        settings: name the data.
        split: "train", "val" or "test".
        kinds: accepted kinds of samples, of `upop.data.columns.KINDS`.
        classes: class names, which labels index; by default those of the data.

    Raises:
        SettingError: no data are given.
        DataError: they cannot be read, or a row is not valid.
    """
    source, part = settings.source(split)
    shared = settings.source("val")[0] is None and settings.hold_out > 0  # val is a share of the training data
    if shared and split == "val":
        source, part = settings.source("train")
    if source is None:
        raise SettingError(
            f"No rows to {'train on' if split == 'train' else 'evaluate on'} are given. Give --data FILE: .jsonl, "
            ".json, .parquet, .csv, .tar, a folder of images, or a name on the hub."
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
            f"{settings.data} has {len(whole)} rows, too few to hold any out. Give validation rows with --val-data "
            "FILE."
        )
    if split == "train":
        return whole.without(set(held))
    found = whole.of(held)
    found.notes = [f"no val data are given: every {len(whole) // len(held)}th row of {settings.data} is held out"]
    return found


def _held_out(count: int, share: float) -> list[int]:
    """Return the indices of held-out rows, evenly spaced."""
    return spread(count, min(max(1, round(share * count)), MOST_HELD_OUT))
