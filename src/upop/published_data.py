"""Numbers of samples in the data sets of the published runs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from upop.errors import SettingError
from upop.packaged import located
from upop.settings import RunSettings
from upop.values import Checked, problems
from upop.yaml_files import read_yaml

PUBLISHED_DATA = Path("configs/published_data.yaml")


class PublishedData(Checked):
    """A published data set."""

    train: int = Field(ge=0, description="what an epoch of training goes through")
    val: int = Field(ge=0, description="what is evaluated after every epoch")
    test: int = Field(ge=0, description="what is evaluated once for every model at the end, beside `val`")
    source: str = Field(description="where the numbers are published")
    texts: int = Field(0, ge=0, description="captions per image of `val` and `test`, where these are queries too")
    exact: bool = Field(True, description="whether `train` is more than a round number")


def published_data(task: str, settings: RunSettings, path: Path = PUBLISHED_DATA) -> PublishedData:
    """Return the counts of the data set that the published runs of a task have with these settings.

    Raises:
        SettingError: the file is missing or damaged, or has no such row.
    """
    name = str(getattr(settings, "dataset", task)) if task.startswith("retrieval") else task
    rows = read_yaml(located(path), "The file of published data sets")
    if not isinstance(rows, dict) or name not in rows:
        raise SettingError(f"{path} has no row {name!r}. Restore it.")
    try:
        return PublishedData.model_validate(rows[name])
    except ValidationError as error:
        raise SettingError(f"{path}, row {name!r}: {problems(error)[0]}.") from error
