"""The pages of docs/ and README.md hold: links lead somewhere, code runs, examples of files are read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from documents import PAGES, README, ROOT, anchors, blocks, file_examples, links
from tiers import mostly_slow
from upop.settings import read_settings
from upop.tasks import TASKS, find_task

GUIDE = ROOT / "docs" / "guide.md"
SAME_FORM = [("nlvr_train", "nlvr_dev"), ("nlvr_train", "nlvr_test"), ("_val", "_test")]
"""Of which files the guide says that they look alike."""
ALL = [README, *PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "assets/README.md"))]


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    assert {page.name for page in PAGES} - {"README.md"} <= set(links(index))
    assert "docs/README.md" in links(README)


RUN = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize(
    "page",
    mostly_slow(RUN, *(page for page in RUN if page.stem not in ("guide", "tokens"))),
    ids=lambda page: page.stem,
)
def test_python_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # One process, as torchrun would start it.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {"__name__": page.stem}
    try:
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in ALL if blocks(page, "bash")], ids=lambda page: page.stem)
def test_scripts_are_bash(page: Path) -> None:
    for script in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)


def test_examples_of_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the guide is read by the task that its YAML file is for, with images of those names."""
    monkeypatch.chdir(tmp_path)
    for name, text in file_examples(GUIDE, "json").items():
        for copy in (name, *(name.replace(*other) for other in SAME_FORM if other[0] in name)):
            Path(copy).parent.mkdir(parents=True, exist_ok=True)
            Path(copy).write_text(text)
        for image in re.findall(r'"([^"]+\.jpg)"', text):
            path = Path("images") / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(path)
    for line in (Path(line) for block in blocks(GUIDE, "text") for line in block.splitlines()):
        line.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if "annotations" in line.parts else "RGB", (40, 30), 1).save(line)
    read = {}
    for name, text in file_examples(GUIDE, "yaml").items():
        task = find_task(name.removesuffix(".yaml"))
        Path(name).write_text(text)
        # Mixing takes images in pairs, and there are few.
        few = {"mixup": 0, "cutmix": 0} if task.name == "classification" else {}
        settings: Any = read_settings(task.settings, Path(name), {"image_size": 32, **few})
        for split in ("train", *task.evaluated(settings)):
            samples: Any = task.dataset(settings, split)
            assert samples[0]
            read[task.name, split] = len(samples)
    published = {name for name, task in TASKS.items() if not task.model_prepares}  # the others take rows
    same = {"retrieval-clip", "retrieval-crossget"}  # their files are those of retrieval
    assert {task for task, _ in read} == published - same
    assert read["vqa", "train"] == 3 and read["caption", "val"] == 2
