"""Classification: whole runs with DeiT's recipe, the published command, and what each mistake says."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import runs
import upop
from upop.checkpoints import save_official
from upop.cli import published_deit
from upop.errors import CheckpointError, DataError, SettingError, UPopError
from upop.pruning import Plan, find_groups
from upop.report.page import run_page
from upop.report.run import read_run
from upop.runs.loaders import first_samples, make_loader
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.classification import ClassificationSettings

ROOT = Path(__file__).parents[2]
TASK = find_task("classification")
UNMIXED = {"mixup": 0.0, "cutmix": 0.0}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images to train on, a dense model with random weights, and the settings for both."""
    return runs.make_task("classification", tmp_path_factory.mktemp("classification"))


def settings_of(config: Path, **overrides: Any) -> ClassificationSettings:
    return read_settings(ClassificationSettings, config, overrides)


@pytest.fixture
def few(config: Path, tmp_path: Path) -> Path:
    """The data with three of its classes."""
    settings = settings_of(config)
    for split in ("train", "val"):
        for name in ("blue-circle", "green-square", "red-triangle"):
            shutil.copytree(settings.data_path / split / name, tmp_path / "few" / split / name)
    return tmp_path / "few"


def test_accuracy_is_that_of_the_likeliest_classes(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config, output_dir=tmp_path)
    results = evaluate_checkpoint(TASK, settings)
    assert results is not None
    assert set(results.models[0].metrics) == {"val", "test"}
    samples = make_loader(TASK, settings, "val").dataset
    model = upop.load(str(settings.pretrained))
    places = []
    with torch.no_grad():
        for number in range(len(samples)):
            sample = samples[number]
            order = model(sample["image"].unsqueeze(0))[0].argsort(descending=True)
            places.append(order.tolist().index(sample["label"]))
    found = results.models[0].metrics["val"]
    for cut in (1, 5):
        assert found[f"acc@{cut}"] == pytest.approx(100 * sum(place < cut for place in places) / len(places))


@pytest.mark.parametrize("place", ["train", "val/run", "link"])
def test_a_run_among_its_images_is_refused(place: str, config: Path, few: Path) -> None:
    (few / "link").symlink_to("train")
    before = sorted(few.rglob("*"))
    with pytest.raises(SettingError, match=r"output_dir=.* lies in .*few.*Choose another"):
        train(TASK, settings_of(config, data_path=few, output_dir=few / place))
    assert sorted(few.rglob("*")) == before


def test_what_is_not_a_number_is_no_right_answer(config: Path) -> None:
    predictions = TASK.predict(
        lambda images: torch.full((len(images), 12), float("nan")),  # type: ignore[arg-type]
        {"images": torch.zeros(24, 3, 8, 8), "labels": torch.arange(24) % 12},
        settings_of(config),
    )
    assert TASK.score(predictions, None, settings_of(config))["acc@1"] < 20  # type: ignore[arg-type]


def test_the_published_search_spares_its_first_step_and_rates_follow_the_settings(config: Path, tmp_path: Path) -> None:
    published = {"method": "reference", "interval": 1, "search_lr": 2e-3}
    compress(TASK, settings_of(config, output_dir=tmp_path, lr_batch=64, init_lr=4e-3, **published))
    rows = [row for row in runs.rows(tmp_path) if "loss" in row]
    searched = [row for row in rows if row["phase"] == "search"]
    assert searched[0]["kept"]["vision"] == 1
    assert searched[1]["kept"]["vision"] < 1
    assert {row["lr"] for row in searched} == {2e-3}
    retrained = [row["lr"] for row in rows if row["phase"] == "retrain"]
    assert retrained[0] == pytest.approx(4e-3 * 16 / 64)  # a quarter of the batch that the rate is meant for
    assert len(set(retrained)) == len(retrained)  # the rate falls at every step
    assert retrained == sorted(retrained, reverse=True)


def test_a_warm_up_of_an_epoch(config: Path, tmp_path: Path) -> None:
    train(TASK, settings_of(config, output_dir=tmp_path, warmup_epochs=1, max_epoch=3))
    rates = [row["lr"] for row in runs.rows(tmp_path) if "loss" in row]
    assert rates.index(max(rates)) in (3, 4)
    assert rates[0] < max(rates) / 3


def test_the_best_model_may_be_the_average_and_it_is_cut_by_the_same_plan(config: Path, tmp_path: Path) -> None:
    """Retraining goes wild here; an average that hardly moves stays what the cut left."""
    trained = tmp_path / "trained"
    train(TASK, settings_of(config, output_dir=trained, max_epoch=6, pretrained=None, init_scale=3.0))
    folder = tmp_path / "2x"
    results = compress(
        TASK,
        settings_of(
            config,
            pretrained=str(trained / "last"),
            output_dir=folder,
            ratio=0.1,
            method="reference",
            search_lr=1e-6,
            init_lr=3.0,
            ema_decay=0.9999,
            max_epoch=2,
        ),
    )
    assert results is not None
    rows = [row for row in runs.rows(folder) if row["phase"] == "retrain" and "split" in row]
    assert ["average" in row for row in rows] == [False, True] * 2
    averages = [row["average"]["acc@1"] for row in rows if "average" in row]
    others = [row["acc@1"] for row in rows if "average" not in row]
    assert max(averages) > max(others)
    assert results.models[1].metrics["val"]["acc@1"] == max(averages)
    plan = Plan.from_json((folder / "plan.json").read_text())
    for name in ("best", "last"):
        kept = {group.name: group.size for group in find_groups(upop.load(folder / name))}
        assert kept == {name: len(entries) for name, entries in plan.items()}
    searched = [row for row in runs.rows(folder) if row["phase"] == "search"]
    assert not any("average" in row for row in searched)  # it carries no masks


@pytest.mark.slow
def test_workers_change_nothing(config: Path, tmp_path: Path) -> None:
    """With augmented, repeated and mixed images, whose chance comes from three libraries."""
    for workers in (0, 2):
        train(TASK, settings_of(config, output_dir=tmp_path / str(workers), num_workers=workers))
    losses = [[row["loss"] for row in runs.rows(tmp_path / name) if "loss" in row] for name in "02"]
    assert losses[0] == losses[1]


def test_augmentation_can_be_left_out(config: Path) -> None:
    settings = settings_of(config, augment=False, repeats=1, **UNMIXED)
    train_samples, val_samples = (make_loader(TASK, settings, split).dataset for split in ("train", "val"))
    assert train_samples.samples.transform.transforms[0].size == val_samples.samples.transform.transforms[0].size
    batch = first_samples(make_loader(TASK, settings, "train"), 4)
    assert set(batch) == {"images", "labels"}
    assert set(first_samples(make_loader(TASK, settings_of(config), "train"), 4)) == {"images", "labels", "targets"}


def test_weights_decay_but_for_biases_norms_and_positions(config: Path) -> None:
    model = TASK.build(settings_of(config))
    groups = TASK.optimizer(model, settings_of(config, weight_decay=0.3)).param_groups
    decayed = {id(value) for group in groups for value in group["params"] if group["weight_decay"] == 0.3}
    spared = {id(value) for group in groups for value in group["params"] if group["weight_decay"] == 0}
    named = dict(model.named_parameters())
    assert len(decayed) + len(spared) == len(named)
    for name, value in named.items():
        matrix = value.dim() > 1 and name not in ("pos_embed", "cls_token")
        assert id(value) in (decayed if matrix else spared), name


def test_a_head_for_other_classes_starts_afresh_and_this_is_said(
    config: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"data_path": few, "batch_size_train": 4, "repeats": 1}
    for verb, folder in ((train, "trained"), (compress, "2x")):
        results = verb(TASK, settings_of(config, output_dir=tmp_path / folder, **changes))
        assert results is not None
        assert "head for 12 classes" in " ".join(capsys.readouterr().out.split())
        assert set(results.models[-1].metrics["val"]) == {"acc@1"}  # five of three classes are no measure
        assert upop.load(tmp_path / folder / "best").config.classes == 3
    published = save_official("classification", upop.load(settings_of(config).pretrained), tmp_path / "dense.pth")
    train(TASK, settings_of(config, pretrained=str(published), output_dir=tmp_path / "again", **changes))
    assert "lacks 2 tensors, which are newly initialised: head.weight, head.bias" in " ".join(
        capsys.readouterr().out.split()
    )
    with pytest.raises(CheckpointError, match=r"has 12 classes, and .* has 3"):
        evaluate_checkpoint(TASK, settings_of(config, output_dir=tmp_path / "e", **changes))


def test_positions_follow_the_size_of_images(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = compress(TASK, settings_of(config, image_size=48, drop_path=0.3, dropout=0.2, output_dir=tmp_path))
    assert results is not None
    assert "position embeddings are resized from 32 to 48 pixels" in " ".join(capsys.readouterr().out.split())
    model: Any = upop.load(tmp_path / "last")
    assert model.pos_embed.shape[1] == 1 + 36
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.blocks[0].mlp.drop1.p == 0.2
    dense: Any = upop.load(settings_of(config).pretrained)
    adapted: Any = TASK.adapt(dense, settings_of(config, image_size=48), training=False)[0]
    assert torch.equal(adapted.head.weight, dense.head.weight)
    assert torch.equal(adapted.pos_embed[:, 0], dense.pos_embed[:, 0])


def invoke(*words: object) -> Any:
    return CliRunner().invoke(published_deit.app, [str(word) for word in words])


def test_the_published_pair_of_commands(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config)
    dense = save_official("deit", upop.load(settings.pretrained), tmp_path / "dense.pth")
    shared = ["--config", config, "--data-path", settings.data_path, "--model", settings.architecture]
    flags = ["--epochs-search", 1, "--epochs", 1, "--batch-size", 16, "--lr-search", "1e-3", "--lr", "1e-3"]
    flags += ["--warmup-epochs", 0, "--p", 0.3, "--interval", 2, "--no-repeated-aug", "--mixup", 0.2, "--aa", "none"]
    flags += ["--world_size", 1, "--dist_url", "env://", "--pin-mem", "--num_workers", 0, "--opt", "adamw"]
    done = invoke(*shared, "--finetune", dense, *flags, "--output_dir", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert re.search(r"reference 1\.[1-3]\d?x", done.output)
    given = read_settings(ClassificationSettings, tmp_path / "run" / "settings.yaml", {})
    assert (given.repeats, given.auto_augment, given.mixup, given.batch_size_test) == (1, None, 0.2, 24)
    compressed = save_official("deit", upop.load(tmp_path / "run" / "best"), tmp_path / "compressed.pth")
    evaluated = invoke(*shared, "--eval", "--dist-eval", "--resume", compressed, "--output_dir", tmp_path / "e")
    assert evaluated.exit_code == 0, evaluated.output
    results = [json.loads((tmp_path / name / "results.json").read_text())["models"] for name in ("run", "e")]
    assert results[0][1]["metrics"] == results[1][0]["metrics"]


def test_the_dense_checkpoint_may_be_behind_a_url(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one was fetched before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    dense = upop.load(settings_of(config).pretrained)
    save_official("deit", dense, tmp_path / "hub" / "checkpoints" / "deit_small-01234567.pth")
    settings = settings_of(config, pretrained="https://example.org/deit_small-01234567.pth", output_dir=tmp_path / "e")
    results = evaluate_checkpoint(TASK, settings)
    assert results is not None
    assert results.models[0].name == "deit_small-01234567.pth"
    assert results.models[0].parameters == upop.count_parameters(dense)


def test_flags_of_the_average(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ClassificationSettings] = []
    monkeypatch.setattr(published_deit, "compress", lambda _task, settings: seen.append(settings))
    for flags in (["--no-model-ema"], ["--model-ema", "--model-ema-decay", "0.9"], []):
        assert invoke("--config", ROOT / "configs" / "classification.yaml", *flags).exit_code == 0
    assert [settings.ema_decay for settings in seen] == [None, 0.9, 0.99996]
    assert seen[0].pretrained == "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--opt", "sgd"], "--opt sgd was given, and only adamw"),
        (["--data-set", "INAT"], "--data-set INAT was given"),
        (["--eval"], "none was given"),
        (["--eval", "--resume", "must"], "none was given"),
        (["--resume", "x.pth"], "--resume x.pth names a checkpoint to evaluate"),
        (["--finetune", "x", "--resume", "must"], "holds no checkpoint"),
        (["--mixup-mode", "all"], "mixup_mode"),
    ],
)
def test_flags_that_do_not_go_together(config: Path, words: list[str], said: str) -> None:
    done = invoke("--config", config, *words)
    assert isinstance(done.exception, UPopError)
    assert said in str(done.exception)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"batch_size_train": 15}, SettingError, r"batch_size_train is 15, and it is odd.*such as 14"),
        ({"classes": 5}, DataError, r"train/green-triangle has label 5, .* classes=5 is set"),
        ({"architecture": "deit_smal_patch16_224", "pretrained": None}, SettingError, "did you mean 'deit_small"),
        ({"auto_augment": "randy"}, SettingError, "auto_augment='randy'"),
        ({"data_path": Path("nowhere")}, DataError, "nowhere/train cannot be read"),
    ],
    ids=["odd batch", "classes", "model", "policy", "no data"],
)
def test_mistakes_come_before_long_work(
    config: Path, tmp_path: Path, changes: dict[str, Any], error: type[UPopError], said: str
) -> None:
    with pytest.raises(error, match=said):
        train(TASK, settings_of(config, output_dir=tmp_path, **changes))
    assert not (tmp_path / "metrics.jsonl").exists() or not runs.rows(tmp_path)


def test_a_small_set_that_is_one_odd_batch(config: Path, few: Path, tmp_path: Path) -> None:
    images = sorted((few / "train").rglob("*.png"))
    for path in images[: 1 - len(images) % 2]:
        path.unlink()
    with pytest.raises(SettingError, match=r"one batch: .*cutmix"):
        train(TASK, settings_of(config, data_path=few, output_dir=tmp_path))
    settings = settings_of(config, data_path=few, output_dir=tmp_path / "unmixed", **UNMIXED)
    assert train(TASK, settings) is not None


def test_any_architecture_of_timm_is_trained_by_name(config: Path, tmp_path: Path) -> None:
    """One without a class token, which pools its patches by attention."""
    settings = settings_of(
        config,
        architecture="vit_base_patch16_siglip_224",
        pretrained=None,
        output_dir=tmp_path / "dense",
        model={**runs.VIT, "vision_depth": 1},
    )
    assert train(TASK, settings) is not None
    smaller = settings.model_copy(
        update={"pretrained": str(tmp_path / "dense" / "best"), "output_dir": tmp_path / "2x"}
    )
    assert compress(TASK, smaller) is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("classification", {"max_epoch": 300, "search_epochs": 60, "interval": 800, "lr_batch": 512, "repeats": 3}),
        ("shapes/classification", {"augment": False, "mixup": 0.0, "cutmix": 0.0, "ema_decay": None}),
    ],
)
def test_settings_of_the_files(name: str, expected: dict[str, Any]) -> None:
    found = settings_of(ROOT / "configs" / f"{name}.yaml")
    assert {key: getattr(found, key) for key in expected} == expected
    if name == "classification":
        default = ClassificationSettings()
        differing = {key for key in ClassificationSettings.model_fields if getattr(found, key) != getattr(default, key)}
        assert differing == {"pretrained", "search_lr", "lr_batch"}


def test_the_loss_is_that_of_smoothed_or_mixed_labels(config: Path) -> None:
    model = nn.Linear(4, 3)
    images, labels = torch.randn(2, 4), torch.tensor([2, 0])
    logs = model(images).log_softmax(1)
    found = TASK.loss(model, {"images": images, "labels": labels}, settings_of(config, smoothing=0.3), 0.0)
    smoothed = 0.7 * nn.functional.one_hot(labels, 3) + 0.1
    torch.testing.assert_close(found, -(smoothed * logs).sum(1).mean())
    shares = torch.tensor([[0.2, 0.8, 0.0], [0.5, 0.0, 0.5]])
    batch = {"images": images, "labels": labels, "targets": shares}
    torch.testing.assert_close(TASK.loss(model, batch, settings_of(config), 0.0), -(shares * logs).sum(1).mean())


NAMES = ["[/] [bold]a", "$x_$ \\frac", "<u>c</u>", "d\ne ```", "\x1b[31mf\u202e", os.fsdecode(b"g\xff")]


def test_names_of_classes_may_be_anything(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run prints and writes is whole and plain, whatever the folders, and the run itself, are called."""
    source, root = settings_of(config).data_path, tmp_path / NAMES[0] / NAMES[4]
    for split in ("train", "val"):
        for found, name in zip(sorted((source / split).iterdir()), [*NAMES, *map(str, range(6))], strict=True):
            shutil.copytree(found, root / split / name.replace("/", ":"))
    (root / "train" / "1" / "[bold]z\x1b.txt").write_text("")
    run = tmp_path / "[bold]run[/] $y_$ \u202e"
    compress(TASK, settings_of(config, data_path=root, output_dir=run, max_epoch=1, search_epochs=1, examples=24))
    printed = capsys.readouterr().out
    assert r"[bold]z\x1b.txt" in " ".join(printed.split())
    page, card = run_page(read_run(run)), (run / "best" / "README.md").read_text(encoding="utf-8")
    for text in (printed, page, card):
        assert not set("\x1b\u202e") & set(text)
    assert "<u>" not in page and r"\udcff" in page
