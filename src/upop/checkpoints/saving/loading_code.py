"""Writes a module beside the weights by which `--trust_remote_code` loads a model whose layers differ in size.

transformers loads such a model once upop is imported. Programs such as lm-eval do not import upop, but have a flag that
lets transformers run code from the folder. The module imports upop and reads the configuration as transformers does.
Without the flag it never runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upop.checkpoints.files.config_json import read_config

_MODULE = "configuration_upop"
_CONFIG = "config.json"
_NAMED = {"AutoConfig": f"{_MODULE}.Config"}
_CODE = '''"""Lets transformers read layers that differ in size, where it may run a folder's code; written by upop."""

import upop.checkpoints.registered  # noqa: F401 - makes compressed models known to transformers
from transformers import {name}


class Config:
    """Reads the configuration, of transformers' own class."""

    from_pretrained = {name}.from_pretrained

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: transformers knows the class."""
'''


def write_code(model: Any, folder: Path) -> None:
    """Write the module beside the weights of a transformers model, and name it in config.json.

    Nothing is written for a configuration class of another library, or if the configuration names code already.

    Args:
        model: the model whose `save_pretrained` wrote the folder.
        folder: the folder.
    """
    kind = type(model.config)
    content = read_config(folder)
    if kind.__module__.partition(".")[0] != "transformers" or content.get("auto_map"):
        return
    (folder / f"{_MODULE}.py").write_text(_CODE.format(name=kind.__name__), encoding="utf-8")
    named = json.dumps({**content, "auto_map": _NAMED}, indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(f"{named}\n", encoding="utf-8")


def forget_code(config: Any) -> None:
    """Remove the name of the module from a loaded configuration: the next folder may not hold it."""
    if getattr(config, "auto_map", None) == _NAMED:
        del config.auto_map
