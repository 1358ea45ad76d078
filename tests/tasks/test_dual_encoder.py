"""Dual encoders of transformers and open_clip: the same verbs, whichever library the model is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny_dual
import upop
from tasks.dual_ranks import gradients_of_half
from tiers import mostly_slow
from together import run_together
from upop.checkpoints.pretrained import open_model
from upop.checkpoints.processors import processor_in
from upop.cli import app
from upop.data.row_images import ImageGallery, LabelledImages
from upop.data.rows import read_rows
from upop.errors import CheckpointError, DataError, SettingError
from upop.models.dual import contrast, embeddings, encoded, sigmoid_loss, taken
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task

AUTOS = ("AutoModelForZeroShotImageClassification", "AutoModel")
TASK = find_task("dual-encoder")


def settings_of(**given: Any) -> Any:
    usual = {"device": "cpu", "num_workers": 0, "batch_size_train": 8, "init_lr": 1e-3, "log_every": 1, "examples": 2}
    return read_settings(TASK.settings, None, {**usual, **given})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dual.write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dual.save_dual("siglip", tmp_path_factory.mktemp("dense") / "siglip")


def inputs_of(folder: Path) -> dict[str, Tensor]:
    processor = processor_in(folder)
    images = [Image.new("RGB", (20, 20), colour) for colour in tiny_dual.COLOURS.values()]
    return {**processor.images(images), **processor.texts(["a red circle", "blue left of green", "no", "a"])}


@pytest.mark.parametrize("kind", mostly_slow(tiny_dual.DUAL, "siglip"))
def test_a_compressed_dual_encoder_embeds_the_same_once_it_is_loaded(kind: str, pairs: Path, tmp_path: Path) -> None:
    dense = tiny_dual.save_dual(kind, tmp_path / "dense")
    given = {"data": str(pairs), "val_data": str(pairs), "epochs": 2}
    results = compress(TASK, settings_of(**given, pretrained=str(dense), output_dir=tmp_path / "2x", ratio=0.5))
    assert results is not None
    before, after = results.models
    assert after.parameters < before.parameters
    best = tmp_path / "2x" / "best"
    opened = open_model(best, AUTOS)
    assert opened.library == ("open_clip" if kind == "open_clip" else "transformers")
    inputs = inputs_of(best)  # by the processor that was kept beside the weights
    for name, value in inputs_of(dense).items():
        assert torch.equal(value, inputs[name])
    again = upop.load(best)
    with torch.no_grad():
        one, other = (embeddings(each(**taken(each.forward, inputs))) for each in (opened.model, again))
        alone = encoded(again, "image", inputs), encoded(again, "text", inputs)
    for first, second, third in zip(one, other, alone, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third, rtol=1e-4, atol=1e-5)
    found = evaluate_checkpoint(
        TASK, settings_of(test_data=str(pairs), pretrained=str(best), output_dir=tmp_path / "e")
    )
    assert found is not None
    assert found.models[0].metrics["test"] == after.metrics["val"]


@pytest.mark.slow
def test_what_is_uniform_is_loaded_by_transformers_alone(siglip: Path, pairs: Path, tmp_path: Path) -> None:
    given = {"data": str(pairs), "epochs": 2, "pretrained": str(siglip), "output_dir": tmp_path}
    with pytest.warns(UserWarning, match="no number.*sizes"):  # SiglipConfig has none for heads
        compress(TASK, settings_of(**given, uniform="tower", target="params=0.8"))
    plain = transformers.SiglipModel.from_pretrained(tmp_path / "best")
    assert "quantization_config" not in json.loads((tmp_path / "best" / "config.json").read_text())
    inputs = inputs_of(tmp_path / "best")
    with torch.no_grad():
        expected = upop.load(tmp_path / "best")(**inputs).logits_per_image
        assert torch.equal(plain.eval()(**inputs).logits_per_image, expected)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "best")
    assert isinstance(processor, transformers.SiglipProcessor)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_the_one_that_the_library_computes(kind: str, tmp_path: Path) -> None:
    folder = tiny_dual.save_dual(kind, tmp_path / kind)
    model, inputs = open_model(folder, AUTOS).model, inputs_of(folder)
    output = model(**inputs, return_loss=True)
    torch.testing.assert_close(contrast(model, output), output.loss)
    if kind == "clip":
        with pytest.raises(SettingError, match="has none"):
            contrast(model, output, "sigmoid")


def test_the_sigmoid_loss_tells_every_pair_by_itself() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    described = -torch.tensor([2.0, 1.0, -0.5, 3.0]).sigmoid().log().sum() / 2
    torch.testing.assert_close(sigmoid_loss(logits), described)


def test_recall_counts_several_captions_of_an_image_as_by_hand() -> None:
    """Three images; the first has two captions, of which one lies nearer to the second image."""
    from upop.models.rerank import candidates

    images = torch.eye(3)
    texts = nn.functional.normalize(
        torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.8, 0.0], [0.2, 0.9, 0.1], [0.0, 0.6, 0.5]]), dim=-1
    )

    class Three:
        image_of_text = torch.tensor([0, 0, 1, 2])

    rows = {}
    rows["texts"], rows["text_scores"] = candidates(images, texts, 10)
    rows["images"], rows["image_scores"] = candidates(texts, images, 10)
    scores = TASK.score(rows, Three(), settings_of())  # type: ignore[arg-type]
    # Best text of the images: 0 (its own), 2 (its own), 3 (its own). Best image of the texts: 0, 1, 1, 1.
    assert scores["TR@1"] == pytest.approx(100.0)
    assert scores["IR@1"] == pytest.approx(50.0)
    assert scores["IR@5"] == pytest.approx(100.0)
    assert scores["r_mean"] == pytest.approx((100 * 5 + 50) / 6)


def test_rows_of_the_same_file_are_one_image_with_all_their_captions(pairs: Path, tmp_path: Path) -> None:
    rows = [{"image": str(pairs.with_name(f"{n // 2}.png")), "caption": f"caption {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gallery = ImageGallery(read_rows(tmp_path / "rows.jsonl", kinds=("caption",), outside=True))
    assert (len(gallery), gallery.image_of_text.tolist()) == (3, [0, 0, 1, 1, 2, 2])
    less = gallery.without({1})
    assert (less.texts, less.image_of_text.tolist()) == (gallery.texts[:2] + gallery.texts[4:], [0, 0, 1, 1])


def test_images_with_labels_are_told_apart_by_sentences_of_their_classes(siglip: Path, tmp_path: Path) -> None:
    folder = tiny_dual.write_classes(tmp_path / "data")
    templates = ["a {} image", "{} it is"]
    found = evaluate_checkpoint(
        TASK,
        settings_of(test_data=str(folder), pretrained=str(siglip), templates=templates, output_dir=tmp_path / "e"),
    )
    assert found is not None
    samples = LabelledImages(read_rows(folder, kinds=("label",)))
    model, processor = upop.load(siglip), processor_in(siglip)
    with torch.no_grad():
        classes = torch.stack(
            [
                encoded(model, "text", processor.texts([each.format(name) for each in templates])).mean(0)
                for name in samples.names
            ]
        )
        images = encoded(model, "image", processor.images([samples[n]["image"] for n in range(len(samples))]))
    best = (images @ nn.functional.normalize(classes, dim=-1).t()).argmax(1)
    right = best == torch.tensor([samples[n]["label"] for n in range(len(samples))])
    assert found.models[0].metrics["test"]["acc@1"] == pytest.approx(100 * float(right.double().mean()))


def test_the_command_names_file_and_row_of_what_is_wrong_before_any_work(siglip: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "0.png", "words": "a red circle"}\n')
    flags = ["compress", "dual-encoder", "--model", str(siglip), "--data", str(tmp_path / "rows.jsonl")]
    done = CliRunner().invoke(app.app, [*flags, "--output-dir", str(tmp_path / "out")])
    assert isinstance(done.exception, DataError)
    assert "rows.jsonl" in str(done.exception)
    assert not (tmp_path / "out" / "best").exists()


def test_what_is_no_dual_encoder_is_refused(tmp_path: Path, pairs: Path) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**tiny_dual.IMAGES))
    model.save_pretrained(tmp_path / "vit")
    tiny_dual.image_processor("vit").save_pretrained(tmp_path / "vit")
    given = settings_of(pretrained=str(tmp_path / "vit"), test_data=str(pairs), output_dir=tmp_path / "e")
    with pytest.raises(CheckpointError, match="is not a dual encoder"):
        evaluate_checkpoint(TASK, given)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_model(siglip: Path, pairs: Path, tmp_path: Path) -> None:
    given = {"data": str(pairs), "epochs": 3, "pretrained": str(siglip), "checkpoint_minutes": 0, "augment": True}
    whole = compress(TASK, settings_of(**given, output_dir=tmp_path / "whole"))

    class EndedError(Exception):
        pass

    class Ending(type(TASK)):  # type: ignore[misc]
        calls = 0

        def loss(self, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            if self.calls > 5:
                raise EndedError
            return super().loss(*args, **kwargs)

    with pytest.raises(EndedError):
        compress(Ending(), settings_of(**given, output_dir=tmp_path / "cut"))
    again = compress(TASK, settings_of(**given, output_dir=tmp_path / "cut", resume="must"))
    assert whole is not None and again is not None
    assert again.models[1].metrics == whole.models[1].metrics
    first, second = (upop.load(tmp_path / name / "last").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_folder_without_weights_is_trained_from_nothing(siglip: Path, pairs: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for file in siglip.iterdir():
        if file.suffix != ".safetensors":
            (empty / file.name).write_bytes(file.read_bytes())
    found = train(TASK, settings_of(data=str(pairs), pretrained=str(empty), epochs=2, output_dir=tmp_path / "out"))
    assert found is not None
    assert isinstance(upop.load(tmp_path / "out" / "best"), transformers.SiglipModel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [{"precision": "bfloat16"}, {"grad_checkpointing": True}, {"distill_similarity": 1.0}]
)
def test_settings_of_memory_and_of_teaching(extra: dict[str, Any], siglip: Path, pairs: Path, tmp_path: Path) -> None:
    given = {"data": str(pairs), "epochs": 2, "pretrained": str(siglip), "output_dir": tmp_path}
    assert compress(TASK, settings_of(**given, **extra)) is not None
    dtype = upop.load(tmp_path / "best").dtype
    assert dtype == (torch.bfloat16 if "precision" in extra else torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_processes_compare_the_pairs_that_one_compares(kind: str, tmp_path: Path) -> None:
    folder = tiny_dual.save_dual(kind, tmp_path / kind)
    model, inputs = open_model(folder, AUTOS).model, inputs_of(folder)
    loss = contrast(model, model(**inputs))
    loss.backward()
    torch.save(inputs, tmp_path / "batch.pt")
    run_together(gradients_of_half, folder, tmp_path / "batch.pt", tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["loss"], loss.detach())
    for name, each in model.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(found["gradients"][name], each.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_run_does_without_an_image_that_cannot_be_read(siglip: Path, tmp_path: Path) -> None:
    data = tiny_dual.write_pairs(tmp_path / "data")
    (tmp_path / "data" / "3.png").write_bytes(b"no image")
    given = {"val_data": str(data), "pretrained": str(siglip), "epochs": 1, "output_dir": tmp_path / "out"}
    with pytest.raises(DataError, match=r"pairs.jsonl, line 4.*3\.png"):
        train(TASK, settings_of(data=str(data), **given))
    found = train(TASK, settings_of(data=str(data), **given | {"output_dir": tmp_path / "less"}, skip_bad_images=1))
    assert found is not None
    assert found.left_out["val"] == (1, 24)
