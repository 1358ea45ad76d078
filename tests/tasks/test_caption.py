"""The captioning task: metrics, whole runs, the file for COCO's server, and the published settings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import runs
import upop
from together import run_script
from upop.checkpoints.official import save_official
from upop.cli.shapes import score_captions_of_shapes
from upop.demo.reading import exact_share
from upop.errors import CheckpointError, SettingError
from upop.metrics import captions as scores
from upop.metrics.captions import caption_scores, deciding_metric
from upop.models.caption import BlipCaption, CaptionConfig
from upop.runs.loaders import first_samples, make_loader
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.blip import blip_tokenizer
from upop.tasks.caption import CaptionSettings, CaptionTask

ROOT = Path(__file__).parents[2]
TASK = find_task("caption")


@pytest.fixture(autouse=True, scope="module")
def _without_the_extra() -> Iterator[None]:
    """Runs here are scored alike on every machine, and do not start Java again and again."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "HAS_COCO", False)
        patch.setattr(CaptionTask, "metric", "bleu4")
        patch.setattr(scores, "REGISTERED", [])  # what commands of other tests registered
        yield


@pytest.fixture(autouse=True)
def _told_again() -> None:
    scores.warn_once.cache_clear()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 captions to train on, 21 images a split, a dense model with random weights, and the settings for all."""
    folder = tmp_path_factory.mktemp("caption")
    # Batches of 8 do not divide 21 images.
    path = runs.make_task("caption", folder, batch_size_test=8, max_epoch=2, search_epochs=1)
    for split in ("val", "test"):
        file = folder / "data" / "annotation" / f"coco_karpathy_{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:21]))
    return path


def settings_of(config: Path, **overrides: Any) -> CaptionSettings:
    return read_settings(CaptionSettings, config, overrides)


@pytest.fixture(scope="module")
def compressed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "2x"
    compress(TASK, settings_of(config, output_dir=folder))
    return folder


# --- metrics


def test_bleu_by_hand() -> None:
    found = caption_scores({1: "the the the the the the the"}, {1: ["The cat is on the mat.", "a cat, on a mat"]})
    assert found["bleu1"] == pytest.approx(100 * 2 / 7)
    assert found["bleu2"] == found["bleu4"] == 0
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, none of four; the reference of the nearest length has 6 words
    text = {1: "a cat sat on the mat"}
    found = caption_scores(text, {1: ["a cat lay on the mat", "one mat"]})
    assert found["bleu2"] == pytest.approx(100 * math.sqrt(5 / 6 * 3 / 5))
    assert found["bleu3"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert found["rouge_l"] == pytest.approx(100 * 5 / 6)
    # all words are right, and two of six are missing
    found = caption_scores({1: "a cat on a"}, {1: ["a cat on a red mat"]})
    assert found["bleu4"] == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_a_caption_that_was_given_is_perfect_whatever_its_marks() -> None:
    found = caption_scores(
        {4: "a red bus , a dog", 2: "two cats on a mat"}, {2: ["Two cats on a mat."], 4: ["x", "A red bus, a dog!"]}
    )
    assert set(found) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"}
    assert list(found.values()) == pytest.approx([100] * 5, rel=1e-5)


def test_empty_captions_score_nothing() -> None:
    assert set(caption_scores({1: "", 2: ""}, {1: ["a cat"], 2: ["a dog"]}).values()) == {0.0}


def test_exact_captions_describe_all_and_nothing_false() -> None:
    scene = ["a small red circle at the top and a large blue square at the bottom", "a red circle and a blue square"]
    described = {
        "a red circle above a blue square": 100,
        "there is a blue square and a red circle": 100,
        "a red circle": 0,
        "a red circle below a blue square": 0,
        "a red circle and a green square": 0,
        "a a red": 0,
        "": 0,
    }
    for text, share in described.items():
        assert exact_share({1: text}, {1: scene})["exact"] == share, text
    both = exact_share({1: "a red circle and a blue square", 2: "a red circle"}, {1: scene, 2: scene})
    assert both["exact"] == 50
    assert exact_share({1: scene[0], 2: "a dog"}, {1: scene, 2: ["a dog on a beach"]}) == {}


def test_commands_score_captions_of_generated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "REGISTERED", [])
    captions, references = {1: "a red circle"}, {1: ["a small red circle at the top"]}
    assert "exact" not in caption_scores(captions, references)
    for _ in range(2):
        score_captions_of_shapes()
    assert caption_scores(captions, references)["exact"] == 100
    assert "exact" not in caption_scores(captions, {1: ["a dog on a beach"]})


@pytest.mark.parametrize(
    ("package", "java", "metric"), [(True, True, "cider"), (True, False, "bleu4"), (False, True, "bleu4")]
)
def test_what_tells_the_best_checkpoint(
    package: bool, java: bool, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "HAS_COCO", package)
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/java" if java else None)
    assert deciding_metric() == metric


def test_a_missing_extra_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caption_scores({1: "a cat"}, {1: ["a cat"]})
    [line] = caplog.messages
    assert "pycocoevalcap is not installed" in line
    assert 'pip install "upop[coco]"' in line


PLAIN_TEXTS = {7: "a cat sits on a mat", 9: "two dogs running", 12: ""}
PLAIN_REFERENCES = {7: ["A cat sits on a mat.", "there is a cat"], 9: ["two dogs run", "dogs\u2028run!"], 12: ["a bus"]}


def with_the_extra(monkeypatch: pytest.MonkeyPatch, java: Path | None) -> dict[str, float]:
    """The published metrics of a few captions, with `java` alone on the path of programs."""
    pytest.importorskip("pycocoevalcap.bleu.bleu", reason='needs pycocoevalcap: pip install "upop[coco]"')
    monkeypatch.setattr(scores, "HAS_COCO", True)
    monkeypatch.setenv("PATH", str(java) if java else "")
    return caption_scores(PLAIN_TEXTS, PLAIN_REFERENCES)


def test_published_metrics_without_java(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    found = with_the_extra(monkeypatch, None)
    assert set(found) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"}
    assert found["bleu1"] == pytest.approx(100 * math.exp(1 - 11 / 9) * 8 / 9, rel=1e-3)
    assert "Java is not installed" in caplog.text


def test_published_metrics_where_java_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It neither hangs nor takes the other metrics down."""
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    found = with_the_extra(monkeypatch, tmp_path)
    assert set(found) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"}
    assert "tokenizer of pycocoevalcap failed" in caplog.text
    assert "meteor could not be computed" in caplog.text


@pytest.mark.slow
def test_published_metrics_with_java(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    java = shutil.which("java")
    if java is None:
        pytest.skip("needs Java")
    found = with_the_extra(monkeypatch, Path(java).parent)
    plain = with_the_extra(monkeypatch, None)
    assert {**found, **plain} == pytest.approx(found)  # these words are split alike
    assert 0 < found["meteor"] < 100
    assert "spice" in found or "SPICE is left out" in caplog.text


# --- whole runs


def captions_of(run: Path, split: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((run / "result" / f"caption_{split}.json").read_text())
    return content


def test_run_folder_and_results(config: Path, compressed: Path, tmp_path: Path) -> None:
    results = json.loads((compressed / "results.json").read_text())
    dense, small = results["models"]
    model = upop.load(compressed / "best")
    assert isinstance(model, BlipCaption)
    assert set(small["metrics"]) == {"val", "test"}
    assert set(small["metrics"]["test"]) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"}
    assert small["parameters"] == upop.count_parameters(model) < dense["parameters"]
    assert small["gmacs"] < dense["gmacs"]
    again = evaluate_checkpoint(TASK, settings_of(config, pretrained=str(compressed / "best"), output_dir=tmp_path))
    assert again is not None
    assert dict(again.models[0].metrics) == small["metrics"]
    for split in ("val", "test"):
        assert captions_of(tmp_path, split) == captions_of(compressed, split)


def test_captions_for_the_server(config: Path, compressed: Path) -> None:
    for split in ("val", "test"):
        found = captions_of(compressed, split)
        asked = TASK.dataset(settings_of(config), split)
        assert [row["image_id"] for row in found] == list(asked.references)
        for row in found:
            assert set(row) == {"image_id", "caption"}
            assert type(row["image_id"]) is int
            assert type(row["caption"]) is str
            assert row["caption"] == row["caption"].strip()
            assert "a picture of" not in row["caption"]
            assert "[" not in row["caption"]


@pytest.mark.slow
def test_the_published_script_over_two_processes_writes_the_same_captions(
    config: Path, compressed: Path, tmp_path: Path
) -> None:
    """With the published flags, and a published file of the compressed model."""
    published = save_official("caption", upop.load(compressed / "best"), tmp_path / "compressed.pth")
    words = ["--evaluate", "--pretrained", published, "--config", config, "--output_dir", tmp_path / "run"]
    words += ["--device", "cpu", "--seed", "42", "--p", "0.5", "--epoch", "5", "--w_sp_attn", "3.2e-2"]
    words += ["--w_sp_mlp", "1e-3", "--dist_url", "env://"]
    run_script(ROOT / "compress_caption.py", *words, PATH="")  # no Java
    for split in ("val", "test"):
        assert captions_of(tmp_path / "run", split) == captions_of(compressed, split)


@pytest.mark.slow
def test_training_from_nothing_learns_and_keeps_the_best_epoch(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = iter([2.0, 1.0])  # of the two epochs
    score = CaptionTask.score
    monkeypatch.setattr(CaptionTask, "score", lambda *args: {**score(*args), "bleu4": next(described, 0.0)})
    train(TASK, settings_of(config, pretrained=None, init_scale=5.0, init_lr=1e-2, output_dir=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 8
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    best, last = (upop.load(tmp_path / name).state_dict() for name in ("best", "last"))
    assert not torch.equal(best["visual_encoder.norm.bias"], last["visual_encoder.norm.bias"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"amp": True, "sample": True},
        {"vit_grad_ckpt": True, "vit_ckpt_layer": 1, "prompt": "", "num_beams": 1, "method": "magnitude"},
    ],
    ids=str,
)
def test_variants_run_through(config: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    results = compress(TASK, settings_of(config, output_dir=tmp_path, max_epoch=1, **changes))
    assert results is not None
    assert results.models[1].parameters < results.models[0].parameters


def test_without_captions_to_compare_with_captions_are_written_all_the_same(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config)
    for split in ("val", "test"):
        samples = json.loads((settings.ann_root / f"coco_karpathy_{split}.json").read_text())
        bare = [{"image": sample["image"]} for sample in samples[:6]]
        (tmp_path / f"coco_karpathy_{split}.json").write_text(json.dumps(bare))
    results = evaluate_checkpoint(
        TASK, settings_of(config, ann_root=tmp_path, coco_gt_root=tmp_path, output_dir=tmp_path / "run")
    )
    assert results is not None
    assert dict(results.models[0].metrics) == {"val": {}, "test": {}}
    assert len(captions_of(tmp_path / "run", "test")) == 6


def test_a_checkpoint_of_another_task_is_refused(config: Path, tmp_path: Path) -> None:
    state = upop.load(str(settings_of(config).pretrained)).state_dict()
    kept = {key: part for key, part in state.items() if not key.startswith("text_decoder.")}
    torch.save({"model": kept}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth lacks text_decoder\."):
        TASK.load(tmp_path / "other.pth", settings_of(config))


# --- settings


def test_captions_are_made_as_the_settings_say(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    generate = BlipCaption.generate

    def watched(self: BlipCaption, *args: Any, **how: Any) -> torch.Tensor:
        asked.append(how)
        return generate(self, *args, **how)

    monkeypatch.setattr(BlipCaption, "generate", watched)
    for changes in ({}, {"sample": True}, {"sample": True, "repetition_penalty": 1.0}, {"num_beams": 1, "top_p": 0.5}):
        settings = settings_of(config, **changes)
        model = TASK.load(Path(str(settings.pretrained)), settings)
        found = TASK.predict(model, first_samples(make_loader(TASK, settings, "val"), 3), settings)
        assert found["words"].shape == (3, settings.max_length - 4)  # [DEC] an image of
    shared = {"max_length": 16, "min_length": 5}
    assert asked == [
        {**shared, "num_beams": 3, "sample": False, "top_p": 0.9, "repetition_penalty": 1.0},
        {**shared, "num_beams": 3, "sample": True, "top_p": 0.9, "repetition_penalty": 1.1},
        {**shared, "num_beams": 3, "sample": True, "top_p": 0.9, "repetition_penalty": 1.0},
        {**shared, "num_beams": 1, "sample": False, "top_p": 0.5, "repetition_penalty": 1.0},
    ]


def test_captions_are_known_words(config: Path) -> None:
    """What `score` gets from tokens of the given captions is a perfect score."""
    settings = settings_of(config)
    samples = TASK.dataset(settings, "val")
    tokenizer = blip_tokenizer(settings.tokenizer)
    texts = [captions[0].lower() for captions in samples.references.values()]
    words = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
    predictions = {"image_ids": torch.tensor(list(samples.references)), "words": words}
    found = TASK.score(predictions, samples, settings)
    assert list(found.values()) == pytest.approx([100] * 5, rel=1e-5)
    rows = TASK.files(predictions, samples, settings, "val")["caption_val.json"]
    assert [row["caption"].replace(" ,", ",") for row in rows] == texts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a picture of " * 6}, r"has 18 tokens, which leaves no room.*max_length=16.*shorten the prompt"),
        ({"max_length": 4}, "min_length .5. is above max_length .4."),
        ({"max_length": 4, "min_length": 0}, r"'a picture of ' has 3 tokens, .*Raise max_length"),
        ({"num_beams": 0}, "num_beams: Input should be greater than or equal to 1"),
        ({"top_p": 0}, "top_p"),
        ({"promt": "a"}, "unknown key 'promt' .did you mean 'prompt'"),
        ({"max_length": 80}, "The model has 64 positions.*max_length=80.*Lower max_length"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(config: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        compress(TASK, settings_of(config, output_dir=tmp_path, **changes))
    assert not (tmp_path / "plan.json").exists()


def test_published_settings_are_the_defaults() -> None:
    path = ROOT / "configs" / "caption_coco.yaml"
    found, plain = read_settings(CaptionSettings, path, {}), CaptionSettings()
    given = yaml.safe_load(path.read_text())
    different = {"pretrained", "batch_size"}
    assert {key: getattr(found, key) for key in given if key not in different} == {
        key: getattr(plain, key) for key in given if key not in different
    }
    assert (found.batch_size_train, found.batch_size_test, plain.batch_size_train) == (32, 32, 32)
    assert (found.init_lr, found.max_epoch, found.interval, found.w_sp_attn, found.w_sp_mlp) == (
        *(1e-5, 5, 100),
        *(3.2e-2, 1e-3),
    )
    assert (found.prompt, found.max_length, found.min_length, found.num_beams) == ("a picture of ", 20, 5, 3)
    assert CaptionConfig().drop_path == 0


def test_batch_size_stands_for_both_unless_one_is_given(tmp_path: Path) -> None:
    settings = CaptionSettings(batch_size=8, batch_size_test=3)
    assert (settings.batch_size_train, settings.batch_size_test) == (8, 3)
    path = tmp_path / "settings.yaml"
    path.write_text(settings.to_yaml())
    assert read_settings(CaptionSettings, path, {}) == settings


@pytest.mark.slow
def test_published_way_of_counting() -> None:
    with torch.device("meta"):
        model = BlipCaption(CaptionConfig.vit("base"))
    counts = TASK.counts(model)
    assert counts["parameters"] / 1e6 == pytest.approx(224.0, abs=0.05)
    assert counts["gmacs"] == pytest.approx(65.7, abs=0.1)
