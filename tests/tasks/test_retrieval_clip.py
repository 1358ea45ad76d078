"""Retrieval with CLIP, from generated images to a compressed model: the same verbs as for every task."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

import runs
import upop
from models.test_clip import SIZES
from pruning.families import randomise
from upop.checkpoints import save_official
from upop.checkpoints.names.clip import to_openai
from upop.cli.published import blip_command
from upop.demo.write import write_shapes
from upop.errors import DataError, SettingError
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.runs.evaluation import evaluate
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.retrieval_clip import ClipRetrievalSettings, ClipRetrievalTask, clip_tokenizer

MODEL = {name: value for name, value in SIZES.items() if name not in ("image_size", "vocab_size", "queue_size")}
TASK = ClipRetrievalTask()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images of 32 pixels to train on, and a YAML file of settings for a tiny model."""
    folder = tmp_path_factory.mktemp("retrieval-clip")
    data = write_shapes("retrieval", folder / "data", seed=3, size=64, image_size=32)
    return runs.write_settings(
        folder / "clip.yaml",
        data.settings,
        pretrained=None,
        image_size=16,
        model={**MODEL, "max_positions": 64},
        queue_size=40,
        batch_size_test=48,
        max_epoch=1,
    )


def settings_of(config: Path, **overrides: Any) -> ClipRetrievalSettings:
    return read_settings(ClipRetrievalSettings, config, overrides)


@pytest.fixture(scope="module")
def dense(config: Path) -> Path:
    """A dense model with random weights, biases and norms, as published."""
    settings = settings_of(config)
    torch.manual_seed(0)
    words = len(clip_tokenizer(settings.tokenizer))
    model = ClipRetrieval(ClipConfig(**settings.model, image_size=16, queue_size=40, vocab_size=words))
    randomise(model, 5)
    model.copy_to_momentum()
    return save_official("retrieval-clip", model, config.with_name("dense.pth"))


@pytest.fixture(scope="module")
def heads() -> dict[str, Any]:
    return {name: MODEL[name] for name in ("vision_heads", "text_heads", "vision_mlp", "text_mlp")}


def test_train_then_compress_then_evaluate(config: Path, tmp_path: Path) -> None:
    assert train(TASK, settings_of(config, output_dir=tmp_path / "dense", max_epoch=2)) is not None
    results = compress(
        TASK, settings_of(config, pretrained=str(tmp_path / "dense" / "best"), output_dir=tmp_path / "2x", ratio=0.5)
    )
    assert results is not None
    before, after = results.models
    assert set(before.metrics) == {"val", "test"}
    assert set(before.metrics["val"]) == {f"{way}@{cut}" for way in ("TR", "IR") for cut in (1, 5, 10)} | {"r_mean"}
    assert after.parameters < before.parameters
    assert before.published_parameters > 1.9 * before.parameters
    assert after.published_parameters < before.published_parameters
    assert after.gmacs < before.gmacs < before.published_gmacs
    again = evaluate_checkpoint(
        TASK, settings_of(config, pretrained=str(tmp_path / "2x" / "best"), output_dir=tmp_path / "again")
    )
    assert again is not None
    assert again.models[0].metrics == after.metrics
    rows = [json.loads(line) for line in (tmp_path / "2x" / "metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"search", "retrain"}


@pytest.mark.slow
def test_the_published_command(config: Path, dense: Path, tmp_path: Path, heads: dict[str, Any]) -> None:
    command = blip_command("retrieval-clip", str(config))
    flags = ["--pretrained", str(dense), "--epoch", "1", "--p", "0.75", "--lr", "2e-3", "--w_sp_attn", "1.1733e-2"]
    folder = tmp_path / "4x"
    done = CliRunner().invoke(command, [*flags, "--output_dir", str(folder)])
    assert done.exit_code == 0, done.output
    assert re.search(r"reference [1-3](\.\d+)?x", done.output)
    assert yaml.safe_load((folder / "settings.yaml").read_text())["init_lr"] == 2e-3
    compressed = save_official("retrieval-clip", upop.load(folder / "best"), tmp_path / "compressed.pth")
    assert upop.count_parameters(upop.load_official("retrieval-clip", compressed, **heads)) < upop.count_parameters(
        upop.load_official("retrieval-clip", dense, **heads)
    )
    evaluated = CliRunner().invoke(
        command, ["--evaluate", "--pretrained", str(compressed), "--output_dir", str(tmp_path / "e")]
    )
    assert evaluated.exit_code == 0, evaluated.output
    results = [json.loads((run / "results.json").read_text()) for run in (folder, tmp_path / "e")]
    assert results[0]["models"][1]["metrics"] == results[1]["models"][0]["metrics"]


def test_recall_is_that_of_all_similarities(config: Path, dense: Path, tmp_path: Path) -> None:
    from upop.runs.devices import make_accelerator
    from upop.runs.loaders import make_loader

    settings = settings_of(config, output_dir=tmp_path)
    model = TASK.load(dense, settings)
    loader = make_loader(TASK, settings, "val")
    accelerator = make_accelerator(settings)
    scores, _ = evaluate(accelerator, TASK, settings, model, accelerator.prepare(loader))
    gallery = TASK.dataset(settings, "val")
    images = torch.stack([gallery[number]["image"] for number in range(len(gallery))])
    words = TASK.collate(settings).tokenize(gallery.texts)["input_ids"]
    with torch.no_grad():
        image, text = model.eval()(images, words)
    similar = image @ text.t()
    right = gallery.image_of_text.unsqueeze(0) == torch.arange(len(images)).unsqueeze(1)
    for name, table, belongs in (("TR", similar, right), ("IR", similar.t(), right.t())):
        order = table.argsort(1, descending=True)
        for cut in (1, 5, 10):
            hits = belongs.gather(1, order[:, :cut]).any(1).float().mean()
            assert scores[f"{name}@{cut}"] == pytest.approx(100 * float(hits), abs=0.6)  # a tie may fall either way


def test_soft_targets_grow_over_the_first_epoch(config: Path) -> None:
    seen: list[float] = []

    class Spy(nn.Module):
        def forward(self, images: Tensor, input_ids: Tensor, ids: Tensor, alpha: float) -> Tensor:
            seen.append(alpha)
            return images.sum()

    batch = {name: torch.zeros(1) for name in ("images", "input_ids", "attention_mask", "ids")}
    for epoch in (0.0, 0.25, 1.0, 2.5):
        TASK.loss(Spy(), batch, settings_of(config), epoch)
    assert seen == pytest.approx([0.0, 0.1, 0.4, 0.4])


def test_queues_of_another_size_start_afresh(config: Path, dense: Path, tmp_path: Path) -> None:
    whole = TASK.load(dense, settings_of(config))
    assert torch.equal(whole.image_queue, torch.load(dense, weights_only=True)["model"]["image_queue"])
    upop.save(whole, tmp_path / "ours")
    for path in (dense, tmp_path / "ours"):
        model = TASK.load(path, settings_of(config, queue_size=24))
        assert model.image_queue.shape == (MODEL["embed_dim"], 24)
        assert model.idx_queue.tolist() == [[-100] * 24]
        assert model.config.queue_size == 24


def test_a_tokenizer_of_another_model_is_refused(config: Path, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
    with pytest.raises(SettingError, match=r"words, and the tokenizer .* 8\. Set tokenizer"):
        TASK.load(dense, settings_of(config, tokenizer=str(tmp_path)))
    with pytest.raises(DataError, match="does not exist"):
        TASK.load(dense, settings_of(config, tokenizer=str(tmp_path / "none")))


def test_a_queue_smaller_than_the_batch_is_refused_before_any_work(config: Path, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="queue_size is 8"):
        train(TASK, settings_of(config, pretrained=str(dense), queue_size=8, output_dir=tmp_path / "x"))


def test_plain_clip_is_fine_tuned(config: Path, dense: Path) -> None:
    state = to_openai(TASK.load(dense, settings_of(config)).state_dict())
    plain = {name: value for name, value in state.items() if "queue" not in name and "_m" not in name.split(".")[0]}
    torch.save({"model": plain}, config.with_name("plain.pth"))
    model, lacking = TASK.start(config.with_name("plain.pth"), settings_of(config))
    assert not lacking
    assert torch.equal(to_openai(model.state_dict())["visual_m.proj"], plain["visual.proj"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("retrieval_coco_clip", {"dataset": "coco", "interval": 200, "max_epoch": 6, "image_size": 336}),
        ("retrieval_flickr_clip", {"dataset": "flickr", "interval": 50, "max_epoch": 12, "weight_decay": 0.2}),
        ("shapes/retrieval_clip", {"dataset": "coco", "queue_size": 1024}),
    ],
)
def test_settings_of_the_files(name: str, expected: dict[str, Any]) -> None:
    found = settings_of(ROOT / "configs" / f"{name}.yaml")
    assert {key: getattr(found, key) for key in expected} == expected
    assert find_task("retrieval-clip").settings is ClipRetrievalSettings
    assert found.w_sp_attn == pytest.approx(1.1733e-2, rel=1e-4)
