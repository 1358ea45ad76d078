"""`--allow-outside`, which every command that reads images has, sets the setting that every task has."""

from __future__ import annotations

from typing import Any

import pytest

from upop.cli import app, published, published_deit, published_segmenter
from upop.runs import verbs
from upop.settings import RunSettings
from upop.tasks import TASKS

COMMANDS: dict[str, tuple[Any, str, Any, list[str]]] = {
    **{f"train {task}": (verbs, "train", app.app, ["train", task]) for task in TASKS},
    "compress": (verbs, "compress", app.app, ["compress", "caption"]),
    "evaluate": (verbs, "evaluate_checkpoint", app.app, ["evaluate", "vqa", "--pretrained", "x"]),
    "run": (verbs, "compress", app.app, ["run", "nlvr2-2x"]),
    "blip": (published, "compress", published.blip_command("nlvr", "configs/nlvr.yaml"), []),
    "deit": (published_deit, "compress", published_deit.app, []),
    "segmenter": (published_segmenter, "compress", published_segmenter.app, ["--log-dir", "x"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--allow-outside", "--allow_outside", None])
def test_the_flag_is_the_setting(command: str, flag: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, verb, typed, words = COMMANDS[command]
    asked: list[RunSettings] = []
    monkeypatch.setattr(module, verb, lambda _task, settings: asked.append(settings))
    monkeypatch.setenv("DATASET", "datasets")
    monkeypatch.setattr("sys.argv", ["upop", *words, *([flag] if flag else [])])
    with pytest.raises(SystemExit) as ended:
        app.main(typed)
    assert ended.value.code == 0
    assert [settings.allow_outside for settings in asked] == [flag is not None]
