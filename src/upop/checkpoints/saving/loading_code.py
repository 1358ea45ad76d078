"""Code in a folder by which programs that may run it import upop, and so can load a model whose layers differ.

transformers reads such a model once upop is imported. A program that people start by a command of its own (lm-eval, for
one) imports no upop, but has a flag that lets transformers run a folder's code: `--trust_remote_code`. That code is one
module here, which imports upop and reads the configuration as transformers does. Without the flag it is not run.
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
    """Write the module beside the weights of a model of transformers, and name it in config.json.

    A configuration of another library's class, or one that names code already, is left as it is.

    Args:
        model: whose `save_pretrained` wrote the folder.
        folder: that is being written.
    """
    kind = type(model.config)
    content = read_config(folder)
    if kind.__module__.partition(".")[0] != "transformers" or content.get("auto_map"):
        return
    (folder / f"{_MODULE}.py").write_text(_CODE.format(name=kind.__name__), encoding="utf-8")
    named = json.dumps({**content, "auto_map": _NAMED}, indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(f"{named}\n", encoding="utf-8")


def forget_code(config: Any) -> None:
    """Take the name of the module out of a configuration that was read: what it is written to next may lack it."""
    if getattr(config, "auto_map", None) == _NAMED:
        del config.auto_map
