"""What holds for every task: it trains, is compressed, kept and read again, and gives the same numbers again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import Tensor

import runs
import upop
from report.pages import Page, check_alone
from tiers import mostly_slow
from upop.checkpoints import save_official
from upop.checkpoints.convert import write_model
from upop.errors import CheckpointError
from upop.examples import Examples
from upop.ownership import MARKER
from upop.pruning import Plan, find_groups
from upop.report.page import comparison_page, run_page
from upop.report.run import read_run
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import RunSettings, read_settings
from upop.tasks import find_task


class Runs:
    """A task's dense model after a little training, and a compressed one made from it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.task, self.folder = find_task(name), folder
        self.config = runs.make_task(name, folder)
        self.trained = train(self.task, self.settings(pretrained=None, output_dir=folder / "trained"))
        self.compressed = compress(
            self.task, self.settings(pretrained=str(folder / "trained" / "best"), output_dir=folder / "2x")
        )

    def settings(self, **overrides: Any) -> RunSettings:
        return read_settings(self.task.settings, self.config, overrides)

    @property
    def best(self) -> Path:
        return self.folder / "2x" / "best"

    def evaluated(self, path: Path) -> dict[str, Any]:
        results = evaluate_checkpoint(
            self.task, self.settings(pretrained=str(path), output_dir=self.folder / "evaluated", batch_size_test=7)
        )
        assert results is not None
        return results.model_dump(mode="json")["models"][0]


@pytest.fixture(scope="module", params=mostly_slow(sorted(runs.TINY), "classification"))
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    torch.set_num_threads(1)
    return Runs(request.param, tmp_path_factory.mktemp(request.param))


def results(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text())["models"]


def test_training_runs_every_step_and_keeps_a_model(done: Runs) -> None:
    rows = runs.rows(done.folder / "trained")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 1 + max(row["step"] for row in rows)))
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows if "loss" in row)
    (dense,) = results(done.folder / "trained")
    assert upop.count_parameters(upop.load(done.folder / "trained" / "best")) >= dense["parameters"]


def test_the_search_masks_half_of_the_cost_and_the_cut_takes_it_away(done: Runs) -> None:
    searched = [row for row in runs.rows(done.folder / "2x") if row["phase"] == "search" and "loss" in row]
    ratios = [row["ratio"] for row in searched]
    assert ratios == sorted(ratios)
    assert ratios[-1] == 0.5
    rates = [row["lr"] for row in runs.rows(done.folder / "2x") if "loss" in row]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
    dense, small = results(done.folder / "2x")
    assert small["parameters"] < dense["parameters"]
    assert small["gmacs"] < dense["gmacs"]
    plan = Plan.from_json((done.folder / "2x" / "plan.json").read_text())
    kept = {group.name: group.size for group in find_groups(upop.load(done.best))}
    assert kept == {name: len(entries) for name, entries in plan.items()}


def test_the_saved_model_gives_the_same_numbers_again(done: Runs) -> None:
    """In batches of another size, too."""
    small, again = results(done.folder / "2x")[1], done.evaluated(done.best)
    assert {name: again[name] for name in ("metrics", "parameters", "gmacs")} == {
        name: small[name] for name in ("metrics", "parameters", "gmacs")
    }


def test_a_checkpoint_is_evaluated_elsewhere_with_the_data_alone(
    done: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How its inputs are prepared is in its folder, its tokenizer too."""
    described = yaml.safe_load(done.config.read_text())
    data = {name: value for name, value in described.items() if name.endswith(("_root", "_path", "_file", "_files"))}
    copy = shutil.copytree(done.best, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    settings = read_settings(
        done.task.settings,
        None,
        {**data, "pretrained": str(copy), "device": "cpu", "num_workers": 0, "output_dir": tmp_path / "out"},
    )
    found = evaluate_checkpoint(done.task, settings)
    assert found is not None
    assert found.models[0].metrics == results(done.folder / "2x")[1]["metrics"]


def test_it_is_kept_and_read_in_the_published_layout(done: Runs) -> None:
    model = upop.load(done.best)
    path = save_official(done.task.name, model, done.folder / "compressed.pth")
    again = upop.load_official(done.task.name, path, **model.config.model_dump())
    expected, found = (each.state_dict() for each in (model, again))
    assert set(expected) == set(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_its_counterpart_in_transformers_gives_the_same_numbers(done: Runs) -> None:
    model = upop.load(done.best)
    if done.task.name in ("nlvr", "segmentation", "vqa"):  # the tiny vqa model's towers differ in width
        with pytest.raises(CheckpointError, match="transformers has no class"):
            write_model(model, done.folder / "theirs", "hugging-face")
        return
    theirs = write_model(model, done.folder / "theirs", "hugging-face")
    small, again = results(done.folder / "2x")[1], done.evaluated(theirs)
    assert {name: again[name] for name in ("metrics", "parameters")} == {
        name: small[name] for name in ("metrics", "parameters")
    }


def test_the_compressed_model_is_an_ordinary_one(done: Runs) -> None:
    model = upop.load(done.best)
    inputs = done.task.example(model, 2)
    given: dict[str, Tensor] = {name: value.clone() for name, value in inputs.items()}
    with torch.no_grad():
        first, second = (model(**inputs) for _ in range(2))
    assert all(torch.equal(given[name], value) for name, value in inputs.items())
    first, second = ((each,) if isinstance(each, Tensor) else each for each in (first, second))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True) if isinstance(one, Tensor))


def test_examples_show_what_the_models_answer(done: Runs) -> None:
    folder = done.folder / "2x" / "examples"
    examples = Examples.read(folder)
    assert len(examples.samples) == 8
    compressed = results(done.folder / "2x")[1]
    described = compressed["metrics"]
    assert described[examples.split], "a split with true answers is taken where there is one"
    used = {"examples.json"}
    for sample in examples.samples:
        assert set(sample.answers) == {"dense", compressed["name"]}
        assert sample.truth is not None
        assert sample.images or sample.prompt
        for answer in (sample.truth, *sample.answers.values()):
            assert answer.text is not None or answer.images
            used |= set(answer.images)
        used |= set(sample.images)
    assert used == {path.name for path in folder.iterdir()} - {MARKER}


def test_every_run_has_a_page_with_its_numbers(done: Runs) -> None:
    done.evaluated(done.best)
    for name, sections in (
        ("2x", {"results", "kept", "curves"}),
        ("trained", {"results", "curves"}),
        ("evaluated", {"results"}),
    ):
        run = read_run(done.folder / name)
        assert not run.missing
        page = Page(run_page(run))
        check_alone(page)
        assert {found["id"] for found in page.named("section")} >= sections | {"examples", "rerun", "settings"}
        measured = results(done.folder / name)
        assert {model["parameters"] / 1e6 for model in measured} <= set(page.numbers)
        shown = [
            model["metrics"][split][metric]
            for model in measured
            for split in model["metrics"]
            for metric in done.task.shown
            if metric in model["metrics"][split]
        ]
        assert shown
        assert set(shown) <= set(page.numbers)
    page = Page(comparison_page([read_run(done.folder / name) for name in ("trained", "2x")]))
    check_alone(page)
    assert page.text.count(results(done.folder / "2x")[1]["name"]) >= 2


def test_the_card_of_the_compressed_model_says_what_was_measured(done: Runs) -> None:
    card = ModelCard.load(done.best / "README.md")
    assert card.data.library_name == "upop"
    assert done.task.name in card.data.tags
    assert card.data.pipeline_tag == done.task.pipeline
    assert set(card.data.metrics) <= set(done.task.shown)
    dense, small = results(done.folder / "2x")
    for model in (dense, small):
        (row,) = (line for line in card.text.splitlines() if line.startswith(f"| {model['name']} |"))
        for metrics in model["metrics"].values():
            for metric in set(metrics) & set(done.task.shown):
                assert f"| {metrics[metric]:.1f}" in row
    assert str(done.folder / "trained" / "best") in card.text
    assert 'upop.load("path/to/this/folder")' in card.text
    assert not (done.folder / "trained" / "best" / "README.md").exists()  # a dense model


def test_another_tasks_model_is_refused(done: Runs, tmp_path: Path) -> None:
    upop.save(torch.nn.Linear(2, 2), tmp_path / "other")
    with pytest.raises(CheckpointError):
        done.evaluated(tmp_path / "other")
