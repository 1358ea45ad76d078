"""Every example runs as it stands."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tiers import mostly_slow

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {"fine_tune.py": ["--out", "small"]}


def test_every_script_is_told_of() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [each.name for each in EXAMPLES.iterdir() if each.suffix in {".py", ".ipynb"}]
    assert files
    assert all(f"({name})" in page for name in files)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", mostly_slow(sorted(each.name for each in EXAMPLES.glob("*.py")), "trainer.py"))
def test_a_script_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    torch.set_num_threads(1)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    before, now = (
        int(part.split()[0].replace(",", ""))
        for line in capsys.readouterr().out.splitlines()
        if " parameters before, " in line
        for part in line.split(" parameters before, ")
    )
    assert now < before


@pytest.mark.filterwarnings("default", "error:.* is now called .*:DeprecationWarning")
def test_the_notebook_runs_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((EXAMPLES / "first_look.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 2
    names: dict[str, object] = {}
    for source in code:
        exec(compile(source, "first_look.ipynb", "exec"), names)
    assert names["reached"]
