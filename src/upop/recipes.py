"""Recipes: the published runs, one row of a YAML file each."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from upop.defaults import RECIPES
from upop.errors import SettingError, nearest
from upop.packaged import located
from upop.values import Checked, problems
from upop.yaml_files import read_yaml


@dataclass(frozen=True)
class _Script:
    """How a published script is called: flags of a compression and of an evaluation, filled in from a recipe."""

    compress: str
    evaluate: str
    processes: int = 8
    environment: str = ""


_BLIP = _Script(
    "--p {ratio:g} --epoch {retraining} --pretrained {pretrained} --config ./{config} --output_dir {output_dir}",
    "--evaluate --pretrained {weights} --config ./{config} --output_dir {output_dir}",
)
_SCRIPTS = {
    "compress_deit.py": _Script(
        "--data-path {data_path} --finetune {pretrained} --model {architecture} --epochs-search {search_epochs} "
        "--epochs {retraining} --batch-size {batch_size_train} --lr-search {search_lr} --lr {init_lr} "
        "--warmup-epochs 0 --p {ratio:g} --interval {interval} --output_dir {output_dir}",
        "--eval --dist-eval --data-path {data_path} --model {architecture} --resume {weights}",
    ),
    "compress_segmenter.py": _Script(
        "--dataset ade20k --backbone vit_small_patch16_384 --decoder mask_transformer --no-resume "
        "--pretrained {pretrained} --epochs-search {search_epochs} --epochs {retraining} --batch-size 64 "
        "--lr-search {search_lr} -lr {init_lr} --p {ratio:g} --interval {interval} --log-dir {output_dir}",
        "--dataset ade20k --backbone vit_small_patch16_384 --decoder mask_transformer --no-resume "
        "--evaluate {weights} --singlescale",
        processes=4,
        environment="DATASET=datasets/vision ",
    ),
}


class Recipe(Checked):
    """One published run."""

    name: str = Field(description="what `upop run` calls it")
    task: str
    script: str = Field(description="the published script that it stands for")
    config: Path
    pretrained: str = Field(description="the dense checkpoint")
    ratio: float = Field(gt=0, lt=1, description="share of the prunable cost to remove")
    epochs: int = Field(ge=2, description="all epochs, of the search and of retraining")
    search_epochs: int | None = Field(None, ge=1, description="of the published search, if not half of all")
    output_dir: Path
    compressed: str = Field(description="name of the published compressed checkpoint")
    paper: str = Field("", description="the paper's result, dense -> compressed")
    settings: Mapping[str, Any] = Field(default_factory=dict, description="what else differs from the config file")

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:
        """Read rows with older names: `p`, `epochs_search`, and `epoch`, which counts the epochs of retraining."""
        if not isinstance(values, Mapping):
            return values
        row = dict(values)
        if "p" in row and "ratio" not in row:
            row["ratio"] = row.pop("p")
        if "epochs_search" in row and "search_epochs" not in row:
            row["search_epochs"] = row.pop("epochs_search")
        searched = row.get("search_epochs") or row.get("epoch")
        if "epochs" not in row and isinstance(row.get("epoch"), int) and isinstance(searched, int):
            row["epochs"] = row.pop("epoch") + searched
        return row

    @model_validator(mode="after")
    def _leaves_epochs(self) -> Self:
        if self.searched >= self.epochs:
            raise ValueError(f"epochs ({self.epochs}) are all epochs, and leave none beside search_epochs")
        return self

    @property
    def searched(self) -> int:
        """Epochs of the published search."""
        return self.search_epochs or self.epochs // 2

    @property
    def retraining(self) -> int:
        """Epochs of retraining after the published search."""
        return self.epochs - self.searched

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that beat the config file's."""
        return {
            "pretrained": self.pretrained,
            "ratio": self.ratio,
            "max_epoch": self.retraining,
            "search_epochs": self.searched,
            "output_dir": self.output_dir,
            **self.settings,
        }

    @property
    def command(self) -> str:
        """The published command of the compression, for as many processes as published."""
        return self._called(self._script.compress)

    @property
    def evaluation(self) -> str:
        """The published command that evaluates the published compressed checkpoint."""
        return self._called(self._script.evaluate)

    @property
    def _script(self) -> _Script:
        return _SCRIPTS.get(self.script, _BLIP)

    def _called(self, flags: str) -> str:
        script = self._script
        weights = shlex.quote(str(self.output_dir / self.compressed))
        values = {**self.settings, **self.model_dump(exclude={"settings"}), "weights": weights}
        values["retraining"] = self.retraining
        # The launcher of torch 2.14 and later takes --p for a flag of its own, unless "--" ends its flags.
        start = f"python -m torch.distributed.run --nproc_per_node={script.processes} -- {self.script}"
        return f"{script.environment}{start} {flags.format(**values)}"


def read_recipes(path: Path = RECIPES) -> dict[str, Recipe]:
    """Return the recipes of a YAML file (a list of rows), by name.

    Raises:
        SettingError: the file is missing or damaged, or a row is; the message says which and what.
    """
    rows = read_yaml(located(path), "The file of recipes")
    if not isinstance(rows, list):
        raise SettingError(f"{path} must hold a list of recipes; found {type(rows).__name__}.")
    recipes: dict[str, Recipe] = {}
    for number, row in enumerate(rows):
        try:
            recipe = Recipe.model_validate(row)
        except ValidationError as error:
            raise SettingError(f"{path}, recipe {number}: {problems(error)[0]}.") from error
        if recipe.name in recipes:
            raise SettingError(f"{path}: two recipes are called {recipe.name!r}.")
        recipes[recipe.name] = recipe
    return recipes


def find_recipe(name: str, path: Path = RECIPES) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        SettingError: there is none; the message names the nearest.
    """
    recipes = read_recipes(path)
    if name not in recipes:
        raise SettingError(f"Recipe {name!r} is not known{nearest(name, list(recipes))}. `upop recipes` lists all.")
    return recipes[name]
