"""`make gpu` works the first time: all of it runs on a CPU, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def report(folder: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Run the command on the CPU; return its exit code, its sections by title, and the page."""
    from gpu.run import main

    code = main(["--device", "cpu", "--small", "--out", str(folder), *arguments])
    [file] = folder.glob("gpu_*.json")
    content = json.loads(file.read_text())
    assert content["machine"]["small"]
    return code, {section["title"]: section for section in content["sections"]}, file.with_suffix(".md").read_text()


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_what_needs_no_compiler(tmp_path: Path) -> None:
    code, sections, page = report(tmp_path, "--only", "elsewhere", "kernels", "steps", "quality", "--minutes", "60")
    assert code == 0
    assert not any(section["skipped"] or section["failed"] for section in sections.values())
    assert [row["dimensions"] for row in sections["Attention kernels"]["rows"]] == [64, 56, 48, 40, 33, 32, 24, 16]
    assert all(row["kept alike"] == 1 for row in sections["Going on elsewhere"]["rows"])
    assert all(row["ms"] > 0 for row in sections["Training steps"]["rows"])
    quality = {(row["smaller"], row["method"]): row for row in sections["Quality"]["rows"]}
    dense = quality.pop(("1x", "dense"))
    assert len(quality) == 8
    for smaller in ("4x", "2x"):
        sizes = [row["parameters (k)"] for (size, _), row in quality.items() if size == smaller]
        assert max(sizes) < 1.03 * min(sizes)
        assert max(sizes) < dense["parameters (k)"]
    assert "| 4x | one first-order cut |" in page


def test_what_does_not_fit_is_left_out_with_the_reason(tmp_path: Path) -> None:
    code, sections, page = report(tmp_path, "--only", "quality", "--minutes", "0")
    assert code == 0
    assert not sections["Quality"]["rows"]
    assert "Left out:\n\n- 1x, dense: no time (0 s left" in page


def test_what_fails_is_told_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import correctness

    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(correctness, "attention_kernel", broken)
    code, sections, page = report(tmp_path, "--only", "kernels", "elsewhere", "--minutes", "60")
    assert code == 1
    assert len(sections["Going on elsewhere"]["rows"]) == 2  # the next section is measured all the same
    assert "Failed:\n\n- 64: RuntimeError: no such kernel" in page


def test_no_gpu_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu.run import main

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    code, sections, _ = report(tmp_path, "--minutes", "60")
    assert code == 0
    assert not any(section["skipped"] or section["failed"] for section in sections.values())
    agreements = sections["Cut models compute what masked ones do"]["rows"]
    assert len(agreements) == 12
    assert all(row["cut"] < 1e-5 for row in agreements if row["precision"] == "float32")
    # Two precisions apart by the same rounding: a wrong cut would be off by tenths.
    assert all(row["cut"] < 3 * row["dense"] + 1e-5 for row in agreements)
