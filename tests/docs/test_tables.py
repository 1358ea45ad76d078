"""What the pages say was measured is what the committed files say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from documents import README, ROOT


def script(name: str) -> ModuleType:
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up there
    import sys

    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


tables = script("docs/tables.py")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_files(page: Path) -> None:
    assert page.read_text() == tables.rewritten(page.read_text()), "run python docs/tables.py"


def test_every_table_is_shown() -> None:
    shown = {name for page in tables.PAGES for name in tables.names(page.read_text())}
    assert shown == set(tables.TABLES)
    assert {"demo", "together"} <= set(tables.names(README.read_text()))


@pytest.fixture(scope="module")
def costs() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "costs.json").read_text())


def test_costs_are_of_every_recipe_and_of_the_script_as_it_is(costs: Any) -> None:
    estimate = script("benchmarks/cost_estimate.py")
    from upop.recipes import read_recipes

    assert [row["name"] for row in costs["recipes"]] == list(read_recipes())
    assert costs["peak_flops"] == estimate.GPUS and costs["utilisation"] == estimate.UTILISATION
    assert (ROOT / "benchmarks" / "results" / "costs.md").read_text() == estimate.table(costs["recipes"])


@pytest.mark.slow
def test_a_recipe_is_counted_as_the_file_says(costs: Any) -> None:
    estimate = script("benchmarks/cost_estimate.py")
    (found,) = estimate.count_all(["deit-small-p0.3"])
    (row,) = [row for row in costs["recipes"] if row["name"] == found.name]
    for part in ("search", "retrain", "evaluate"):
        assert getattr(found, part) == pytest.approx(row[part], rel=1e-9)
    # Three times a forward pass, but for the products of the first layer with its inputs' gradients.
    assert 2.9 < found.dense.train / found.dense.forward < 3.01
    assert row["gpu_hours"]["A100"] == pytest.approx(row["total"] * 1e18 / (0.35 * 312e12) / 3600)


def test_the_figures_are_those_of_a_search_that_ended() -> None:
    folder = ROOT / "docs" / "figures"
    numbers = json.loads((folder / "figures.json").read_text())
    assert numbers["asked_matches_formula"]
    assert numbers["marked_at_the_end"] == pytest.approx(numbers["ratio"], abs=1e-3)
    changes = numbers["change_by_last_cut"]
    assert changes["ours, float64"] < 1e-10 and changes["ours, float32"] < 1e-5
    assert {path.stem for path in folder.glob("*.svg")} == {"schedule", "masks", "scores", "kept", "error"}


def shown(page: str) -> str:
    return " ".join((ROOT / "docs" / page).read_text().split())


def test_the_log_says_what_the_files_say() -> None:
    def points(file: str, split: str, metric: str, ratio: str) -> float:
        found = {row["name"]: row["metrics"][split][metric] for row in tables.read(file)["models"]}
        return float(found[f"UPop {ratio}"] - found[f"magnitude {ratio}"])

    text = shown("log.md")
    classes = [-points("shapes_classification_cpu", "test", "acc@1", ratio) for ratio in ("2x", "4x")]
    assert "ahead on classification, by {:.1f} points at 2x and {:.1f} at 4x".format(*classes) in text
    clip = [points("shapes_retrieval-clip_cpu", "test", "TR@1", ratio) for ratio in ("2x", "4x")]
    assert f"at 2x, by {-clip[0]:.1f} points of TR@1, and {clip[1]:.1f} behind at 4x" in text
    asked = [points("shapes_vqa_cpu", "val", "accuracy", ratio) for ratio in ("2x", "4x")]
    assert "leads by {:.0f} and {:.0f} points".format(*asked) in text
    found = [points("shapes_retrieval_cpu", "test", "TR@1", ratio) for ratio in ("2x", "4x")]
    assert "BLIP's retrieval by {:.0f} and {:.0f} points".format(*found) in text
    assert points("shapes_segmentation_cpu", "validation", "mIoU", "2x") > 0
    step = tables.read("search_step_amd-epyc")["models"]["blip-nlvr"]["ours"]
    described = (
        f"{100 * step['time_ratio'] - 100:.1f} % and all steps together at {100 * step['time_ratio_total'] - 100:.1f} %"
    )
    assert described in text


def test_readme_says_what_the_files_say() -> None:
    rows = tables.read("latency_amd-epyc")["rows"]
    faster = [row["variants"][form]["speed_up"] for row in rows for form in ("2x", "2x align 8")]
    assert f"({min(faster):.1f} to {max(faster):.1f} times at 2x on a CPU)" in " ".join(README.read_text().split())


@pytest.mark.parametrize("page", ["../README.md", "log.md", "guide.md"])
def test_what_a_teacher_costs_is_what_the_file_says(page: str) -> None:
    headings, rows = tables.quality.levers(tables.read("quality_levers_val_cpu"))
    (cost,) = [float(row[headings.index("time")]) for row in rows if row[0] == "upop, the default"]
    assert f"{cost:.1f} times the time" in shown(page)


def test_best_methods_are_bold_and_what_is_missing_is_said() -> None:
    def group(task: str, method: str, **more: Any) -> dict[str, Any]:
        common = {"task": task, "method": method, "cost": "params", "budget": 100, "reduction": "4x", "metric": "x"}
        sizes = {"parameters": 1000, "macs": 5000, "seconds": 2.0, "before_cut": 16, "std": 0.5, "n": 3}
        return {**common, **sizes, **more}

    content = {
        "groups": [
            group("classification", "dense", mean=99.0, budget=0, reduction="1x", std=None, n=1, parameters=4000),
            group("classification", "upop", mean=90.0),
            group("classification", "Taylor", mean=91.0, before_cut=10, n=2),
            group("classification", "no progress", mean=88.0),
            group("classification", "reference 36:1", mean=95.0, parameters=1500),
            group("vqa", "upop", mean=80.0),
        ]
    }
    ((title, (_, rows)),) = tables.quality.whole(content, "params")
    assert title == "4x, 100 steps, 2 to 3 seeds"
    found = {row[0]: row[1:4] for row in rows}
    assert found["dense"] == ["", "99.0 (4 k)", "-"]
    assert found["upop, the default"] == ["16 + 84", "90.0 ± 0.5 (1 k, 2.00 s)", "**80.0 ± 0.5** (1 k, 2.00 s)"]
    assert found["Taylor, cut first"] == ["10 + 90", "**91.0 ± 0.5** (1 k, 2.00 s)", "-"]
    assert found["reference, costs 36 : 1"][1] == "95.0 ± 0.5 (2 k, 2.00 s)"  # larger, so no rival
    assert found["*upop, lead over the best other method*"] == ["", "-1.0 (Taylor, spread 0.5)", "-"]
    assert found["*upop, lead over its best variant*"] == ["", "+2.0 (one cut, spread 0.5)", "-"]
    assert not tables.quality.whole(content, "macs")


@pytest.mark.parametrize("page", ["README.md", "docs/README.md", "CHANGELOG.md"])
def test_as_many_architectures_as_the_page_lists(page: str) -> None:
    (count,) = re.findall(r"^(\d+) architectures are verified", shown_lines("coverage.md"), flags=re.MULTILINE)
    assert re.search(rf"\b{count} (architectures|are proved)", (ROOT / page).read_text())


def shown_lines(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def test_the_method_says_what_the_figures_show() -> None:
    numbers = json.loads((ROOT / "docs" / "figures" / "figures.json").read_text())
    text = shown("method.md")
    assert f"({numbers['half_asked_after']} of {numbers['steps']})" in text
    kept = [f"{100 * numbers['kept'][part]:.0f} %" for part in ("vision attention", "text attention", "vision mlp")]
    assert "vision attention kept {} of its dimensions, the text attention {}, the vision MLPs {}".format(*kept) in text
    costs = set(numbers["entry_costs"].values())
    assert costs == {1161.0, 193.0} and "1,161 for an attention dimension and 193 for a neuron" in text


@pytest.mark.slow
def test_the_costs_of_entries_of_a_full_size_model() -> None:
    import timm
    import torch

    import upop
    from upop.pruning.costs import channel_costs

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    costs = channel_costs(model, upop.find_groups(model), "params")
    assert set(costs.values()) == {36_900.0, 1_537.0} and "in ViT-B 36,900 and 1,537" in shown("method.md")
