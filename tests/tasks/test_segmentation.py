"""Segmentation, from generated images to a compressed model: the same verbs as for every task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import runs
import upop
from pruning.families import randomise
from together import run_script
from upop.checkpoints import save_official
from upop.cli import published_segmenter
from upop.data.segmentation import FOLDER
from upop.data.segmentation_transforms import IGNORED
from upop.demo.segmentation_files import CLASSES
from upop.demo.write import write_shapes
from upop.errors import DataError, RunFolderError, SettingError, UPopError
from upop.metrics.segmentation import confusion, iou_per_class, named_ious, segmentation_scores
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.report.blends import blended, class_colour, write_blends
from upop.runs.loaders import make_loader
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.segmentation import SegmentationSettings, SegmentationTask
from upop.tasks.windows import Window

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "compress_segmenter.py"
TASK = SegmentationTask()
MODEL = runs.SEGMENTER
SIZES = {**MODEL, "image_size": 32, "classes": len(CLASSES)}
METRICS = {"mIoU", "pixel accuracy", "class accuracy"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 32 pixels to train on, and a YAML file of settings for a tiny model."""
    folder = tmp_path_factory.mktemp("segmentation")
    data = write_shapes("segmentation", folder / "data", seed=3, size=24, image_size=32)
    held_out = folder / "data" / FOLDER
    # Fewer and of other sizes: no batch of two processes comes out even.
    for kind in ("images", "annotations"):
        files = sorted((held_out / kind / "validation").iterdir())
        for path in files[7:]:
            path.unlink()
        for path, size in zip(
            files, [(32, 32), (50, 34), (20, 60), (32, 32), (33, 32), (9, 12), (32, 40)], strict=False
        ):
            with Image.open(path) as image:
                image.resize(size, Image.Resampling.NEAREST).save(path)
    return runs.write_settings(
        folder / "segmentation.yaml",
        data.settings,
        **{**runs.TINY["segmentation"], "pretrained": None, "batch_size_train": 8, "max_epoch": 1},
    )


def settings_of(config: Path | None, **overrides: Any) -> SegmentationSettings:
    return read_settings(SegmentationSettings, config, overrides)


@pytest.fixture(scope="module")
def dense(config: Path) -> Path:
    """A dense model with random weights, biases and norms, as published."""
    model = Segmenter(SegmenterConfig(**SIZES))
    randomise(model, 5)
    return save_official("segmentation", model, config.with_name("dense.pth"))


@pytest.fixture
def model_sizes() -> list[str]:
    """What shapes do not tell of a published file."""
    return ["--set", f"model={json.dumps({name: MODEL[name] for name in MODEL if name.endswith(('heads', 'mlp'))})}"]


def test_train_then_compress_then_evaluate(config: Path, tmp_path: Path) -> None:
    assert train(TASK, settings_of(config, output_dir=tmp_path / "dense", max_epoch=2)) is not None
    folder = tmp_path / "2x"
    pretrained = str(tmp_path / "dense" / "best")
    results = compress(TASK, settings_of(config, pretrained=pretrained, output_dir=folder, ratio=0.5, blend=2))
    assert results is not None
    before, after = results.models
    assert set(before.metrics) == {"validation"}
    assert set(before.metrics["validation"]) == METRICS
    assert after.parameters < before.parameters
    assert after.gmacs < before.gmacs
    kept = {group.name: group.size for group in upop.find_groups(upop.load(folder / "best"))}
    assert any(name.startswith("decoder.") for name in kept)
    evaluated = settings_of(config, pretrained=str(folder / "best"), output_dir=tmp_path / "again", blend="all")
    again = evaluate_checkpoint(TASK, evaluated)
    assert again is not None
    assert again.models[0].metrics == after.metrics
    per_class = json.loads((folder / "result" / "iou_per_class_validation.json").read_text())
    assert list(per_class) == list(CLASSES)
    met = [value for value in per_class.values() if value is not None]
    assert sum(met) / len(met) == pytest.approx(after.metrics["validation"]["mIoU"], abs=1e-3)
    names = [f"ADE_val_{number:08d}.png" for number in range(1, 8)]
    assert sorted(path.name for path in (folder / "blended").iterdir()) == names[:2]
    assert sorted(path.name for path in (tmp_path / "again" / "blended").iterdir()) == names
    with Image.open(folder / "blended" / names[1]) as image:
        assert image.size == (3 * 50, 34)


def test_masks_stay_at_the_first_step(config: Path, dense: Path, tmp_path: Path) -> None:
    sizes = {name: MODEL[name] for name in MODEL if name.endswith(("heads", "mlp"))}
    published = {"method": "reference", "cost": "reference"}
    chosen = settings_of(config, pretrained=str(dense), model=sizes, output_dir=tmp_path, ratio=0.5, **published)
    assert compress(TASK, chosen) is not None
    searched = [row for row in runs.rows(tmp_path) if row["phase"] == "search" and "loss" in row]
    assert searched[0]["kept"]["vision"] == 1.0
    assert searched[-1]["kept"]["vision"] < 1.0


@pytest.mark.slow
def test_the_published_pair_of_commands(
    config: Path, dense: Path, tmp_path: Path, model_sizes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATASET", str(config.parent / "data"))
    shared = [
        "--dataset",
        "ade20k",
        "--config",
        str(config),
        "--decoder",
        "mask_transformer",
        "--no-resume",
        *model_sizes,
    ]
    folder = tmp_path / "run"
    flags = [
        "--pretrained",
        str(dense),
        "--epochs-search",
        "1",
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--optimizer",
        "sgd",
    ]
    rates = [
        "--lr-search",
        "1e-3",
        "-lr",
        "2e-3",
        "--scheduler",
        "polynomial",
        "--weight-decay",
        "0",
        "--drop-path",
        "0.2",
    ]
    method = [
        "--method",
        "reference",
        "--p",
        "0.3",
        "--interval",
        "1",
        "--log-dir",
        str(folder),
        "--eval-freq",
        "2",
        "--no-amp",
    ]
    done = CliRunner().invoke(published_segmenter.app, [*shared, *flags, *rates, *method])
    assert done.exit_code == 0, done.output
    found = yaml.safe_load((folder / "settings.yaml").read_text())
    wanted = {
        "search_lr": 1e-3,
        "init_lr": 2e-3,
        "ratio": 0.3,
        "interval": 1,
        "schedule": "polynomial",
        "drop_path": 0.2,
    }
    assert {name: found[name] for name in wanted} == wanted
    rates_taken = [row["lr"] for row in runs.rows(folder) if "loss" in row]
    assert rates_taken == pytest.approx([1e-3] * 3 + [2e-3 * (1 - step / 6) ** 0.9 for step in range(6)])
    compressed = save_official("segmentation", upop.load(folder / "best"), tmp_path / "compressed.pth")
    scores = []
    for number, (weights, scale) in enumerate(
        ((compressed, "--singlescale"), (dense, "--singlescale"), (dense, "--multiscale"))
    ):
        place = tmp_path / str(number)
        words = [*shared, "--evaluate", str(weights), scale, "--log-dir", str(place)]
        done = CliRunner().invoke(published_segmenter.app, words)
        assert done.exit_code == 0, done.output
        scores.append(json.loads((place / "results.json").read_text())["models"][0]["metrics"]["validation"])
        assert yaml.safe_load((place / "settings.yaml").read_text())["multiscale"] is (scale == "--multiscale")
    before, after = (
        model["metrics"]["validation"] for model in json.loads((folder / "results.json").read_text())["models"]
    )
    assert scores[0] == pytest.approx(after, abs=0.05)  # queries were scaled there and back
    assert scores[1] == before
    assert set(scores[2]) == METRICS


def test_what_the_published_command_refuses(config: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(*words: str) -> str:
        done = CliRunner().invoke(published_segmenter.app, ["--dataset", "ade20k", "--config", str(config), *words])
        assert isinstance(done.exception, UPopError)
        return str(done.exception)

    monkeypatch.delenv("DATASET", raising=False)
    assert "The environment variable DATASET is not set" in says()
    monkeypatch.setenv("DATASET", str(config.parent / "data"))
    assert "known are ade20k" in says("--dataset", "cityscapes")
    assert "were both given" in says("--resume", "auto", "--no-resume")
    assert "holds no checkpoint" in says("--resume", "must")
    assert "did you mean" not in says("--backbone", "resnet")
    assert "backbone" in says("--backbone", "resnet")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "number of processes, 4" in says("--batch-size", "30")


def test_the_root_script_runs(
    config: Path,
    dense: Path,
    tmp_path: Path,
    model_sizes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    root_script: Callable[..., tuple[int, str]],
) -> None:
    words = ["--dataset", "ade20k", "--config", config, "--evaluate", dense, "--log-dir", tmp_path / "e"]
    monkeypatch.setenv("DATASET", str(config.parent / "data"))
    code, text = root_script(SCRIPT.name, *words, *model_sizes)
    assert code == 0, text
    assert "dense.pth" in text


@pytest.mark.slow
def test_two_processes_count_what_one_counts(config: Path, dense: Path, tmp_path: Path, model_sizes: list[str]) -> None:
    """Seven images in batches of two, over two processes: the last batch is filled up, and that does not count."""
    words = [
        "--dataset",
        "ade20k",
        "--config",
        str(config),
        "--evaluate",
        str(dense),
        "--set",
        "blend=all",
        *model_sizes,
    ]
    for processes in (1, 2):
        log = ["--log-dir", tmp_path / str(processes)]
        run_script(SCRIPT, *words, *log, processes=processes, DATASET=str(config.parent / "data"))
    found = [json.loads((tmp_path / name / "results.json").read_text())["models"][0]["metrics"] for name in "12"]
    assert found[0] == found[1]
    files = ["result/iou_per_class_validation.json", *(f"blended/ADE_val_{number:08d}.png" for number in range(1, 8))]
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


@pytest.mark.slow
def test_two_processes_train(config: Path, dense: Path, tmp_path: Path, model_sizes: list[str]) -> None:
    """Data-parallel training would stop at a parameter that gets no gradient."""
    words = ["--dataset", "ade20k", "--config", str(config), "--pretrained", str(dense), "--epochs-search", "1"]
    words += ["--epochs", "1", "--batch-size", "8", "--p", "0.5", "--log-dir", str(tmp_path / "two"), *model_sizes]
    run_script(SCRIPT, *words, DATASET=str(config.parent / "data"))
    assert yaml.safe_load((tmp_path / "two" / "settings.yaml").read_text())["batch_size_train"] == 4
    assert len([row for row in runs.rows(tmp_path / "two") if "loss" in row]) == 6


labels_and_guesses = st.integers(1, 6).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(
            st.tuples(st.one_of(st.just(IGNORED), st.integers(0, classes - 1)), st.integers(0, classes - 1)),
            min_size=1,
            max_size=40,
        ),
    )
)


@hypothesis_settings(deadline=None)
@given(labels_and_guesses)
def test_the_confusion_matrix_is_what_one_counts(case: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pixels = case
    labels, guesses = (torch.tensor(values) for values in zip(*pixels, strict=True))
    counts = confusion(guesses, labels, classes)
    naive = torch.zeros(classes, classes, dtype=torch.long)
    for label, guess in pixels:
        if label != IGNORED:
            naive[label, guess] += 1
    assert torch.equal(counts, naive)
    for number, value in enumerate(iou_per_class(counts).tolist()):
        true = {place for place, (label, _) in enumerate(pixels) if label == number}
        said = {place for place, (label, guess) in enumerate(pixels) if guess == number and label != IGNORED}
        if true | said:
            assert value == pytest.approx(100 * len(true & said) / len(true | said))
        else:
            assert value != value


def test_scores_by_hand() -> None:
    counts = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert segmentation_scores(counts) == pytest.approx(
        {"mIoU": 100 * (3 / 4 + 2 / 3) / 2, "pixel accuracy": 100 * 5 / 6, "class accuracy": 100 * (3 / 4 + 1) / 2}
    )
    assert named_ious(counts, ["sky", "tree", "car"]) == {"sky": 75.0, "tree": pytest.approx(66.6667), "car": None}


def test_a_batch_without_a_labelled_pixel_has_no_loss(config: Path) -> None:
    model = Segmenter(SegmenterConfig(**SIZES))
    images, labels = torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), IGNORED)
    batch = {"images": images, "labels": labels}
    with torch.no_grad():
        assert float(TASK.loss(model, batch, settings_of(config), 0.0)) == 0.0
        labels[0, :5] = 1
        expected = torch.nn.functional.cross_entropy(model(images), labels, ignore_index=IGNORED)
        found = TASK.loss(model, batch, settings_of(config), 0.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_optimizer_is_the_published_one() -> None:
    model = Segmenter(SegmenterConfig(**SIZES))
    (group,) = TASK.optimizer(model, settings_of(None)).param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["lr"]) == (0.9, True, 0.0, 4e-3)
    assert len(group["params"]) == len(list(model.parameters())) - 2  # without the encoder's idle head
    assert isinstance(TASK.optimizer(model, settings_of(None, optimizer="adamw")), torch.optim.AdamW)


@pytest.mark.parametrize(("multiscale", "passes"), [(False, 1), (True, 12)])
def test_several_scales_are_six_each_mirrored_too(config: Path, multiscale: bool, passes: int) -> None:
    model = Segmenter(SegmenterConfig(**SIZES)).eval()
    calls: list[tuple[int, ...]] = []
    model.register_forward_hook(lambda _model, inputs, _output: calls.append(tuple(inputs[0].shape)))
    settings = settings_of(config, multiscale=multiscale, window_batch=100)
    batch = {"images": [torch.randn(3, 50, 34)], "labels": [torch.zeros(50, 34, dtype=torch.long)]}
    with torch.no_grad():
        (counts,) = TASK.predict(model, batch, settings)["confusion"]
    assert int(counts[0].sum()) == int(counts.sum()) == 50 * 34
    assert len(calls) == passes
    assert {shape[1:] for shape in calls} == {(3, 32, 32)}


def test_training_crops_are_augmented_and_evaluation_sees_whole_images(config: Path) -> None:
    drawn = settings_of(config, augment=True, crop_size=24)
    samples = make_loader(TASK, drawn, "train").dataset
    assert samples[0]["image"].shape == (3, 24, 24)
    shapes = [tuple(sample["labels"].shape) for sample in (TASK.dataset(drawn, "val")[n] for n in range(3))]
    assert shapes == [(32, 32), (34, 50), (60, 20)]
    assert drawn.window == Window(24, 24)
    assert settings_of(config).window == Window(32, 24)


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "label",
        lambda root: Image.new("L", (32, 32), 14).save(root / "annotations/validation/ADE_val_00000004.png"),
        "label 14",
    ),
    (
        "size",
        lambda root: Image.new("L", (31, 32), 1).save(root / "annotations/validation/ADE_val_00000004.png"),
        "31 x 32",
    ),
    ("cut", lambda root: (root / "images/validation/ADE_val_00000004.png").write_bytes(b"\x89PNG"), "cannot be read"),
    ("map", lambda root: (root / "annotations/validation/ADE_val_00000004.png").unlink(), "has no label map"),
]


@pytest.mark.parametrize(("harm", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_files_are_named(
    config: Path, dense: Path, tmp_path: Path, harm: Callable[[Path], object], says: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(config.parent / "data", data)
    harm(data / FOLDER)
    sizes = {name: MODEL[name] for name in MODEL if name.endswith(("heads", "mlp"))}
    chosen = settings_of(config, pretrained=str(dense), model=sizes, dataset_root=data, output_dir=tmp_path / "run")
    with pytest.raises(DataError, match=says) as caught:
        compress(TASK, chosen)
    assert "ADE_val_00000004" in str(caught.value)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_another_number_of_classes_is_refused(config: Path, tmp_path: Path) -> None:
    model = Segmenter(SegmenterConfig(**{**SIZES, "classes": 5}))
    upop.save(model, tmp_path / "five")
    with pytest.raises(SettingError, match="The model has 5 classes, and classes is 13"):
        TASK.load(tmp_path / "five", settings_of(config))
    with pytest.raises(DataError, match="names 13 classes, and classes is 5"):
        TASK.dataset(settings_of(config, classes=5), "val")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"window_stride": 40}, r"window_stride \(40\) is above window_size \(32\)"),
        ({"classes": 255}, "classes"),
        ({"blend": -1}, "blend"),
        ({"blend": "some"}, "blend"),
        ({"decoder": "unet"}, "decoder"),
    ],
)
def test_settings_that_make_no_sense(config: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        settings_of(config, **wrong)


def test_settings_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATASET", raising=False)
    published = settings_of(ROOT / "configs" / "segmentation.yaml")
    expected = {
        "init_lr": 4e-3,
        "weight_decay": 0.0,
        "schedule": "polynomial",
        "optimizer": "sgd",
        "max_epoch": 64,
        "search_epochs": 16,
        "image_size": 512,
        "window": Window(512, 512, 8),
        "root": Path("datasets/vision/ade20k/ADEChallengeData2016"),
    }
    assert {name: getattr(published, name) for name in expected} == expected
    monkeypatch.setenv("DATASET", "/data/sets")
    assert settings_of(None).root == Path("/data/sets/ade20k/ADEChallengeData2016")
    shapes = settings_of(ROOT / "configs" / "shapes" / "segmentation.yaml")
    assert shapes.classes == len(CLASSES)
    assert shapes.root == Path("output/shapes/segmentation/ade20k/ADEChallengeData2016")
    assert isinstance(TASK.build(shapes), Segmenter)
    assert find_task("segmentation").settings is SegmentationSettings


def test_blends_show_classes_as_colours_and_leave_the_rest(tmp_path: Path) -> None:
    colours = {class_colour(label) for label in range(150)}
    assert len(colours) == 150
    image = torch.full((3, 4, 6), 100, dtype=torch.uint8)
    labels = torch.full((4, 6), IGNORED)
    labels[:, 3:] = 7
    mixed = blended(image, labels, 13)
    assert torch.equal(mixed[:, :, :3], image[:, :, :3])
    wanted = 0.4 * 100 + 0.6 * torch.tensor(class_colour(7)).float()
    assert float((mixed[:, 0, 5].float() - wanted).abs().max()) <= 1
    assert torch.equal(blended(image, torch.full((4, 6), IGNORED), 13), image)
    write_blends(tmp_path / "new" / "one.png", image, labels, labels, 13)
    with Image.open(tmp_path / "new" / "one.png") as written:
        assert written.size == (18, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written: File exists"):
        write_blends(tmp_path / "file" / "one.png", image, labels, labels, 13)


def test_the_linear_decoder_trains(config: Path, tmp_path: Path) -> None:
    results = train(TASK, settings_of(config, decoder="linear", output_dir=tmp_path, blend=1))
    assert results is not None
    model = upop.load(tmp_path / "best")
    assert isinstance(model, Segmenter)
    assert model.config.decoder == "linear"
    assert isinstance(model(torch.zeros(1, 3, 32, 32)), Tensor)
