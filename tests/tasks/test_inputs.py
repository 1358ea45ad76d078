"""How images and texts are prepared comes from the checkpoint or its folder, whoever wrote it, unless it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tvf

import runs
import upop
from upop.checkpoints import save_official
from upop.data.clip_tokenizer import load_clip_tokenizer
from upop.data.transforms import eval_transform
from upop.errors import CheckpointError, SettingError, UPopError
from upop.preparation import Images
from upop.runs.inputs import resolved
from upop.runs.verbs import evaluate_checkpoint, train
from upop.settings import RunSettings, read_settings
from upop.tasks import find_task

WORDS = ["a", "b", "c", "r", "e", "d", "a</w>", "b</w>", "c</w>", "d</w>", "re", "red</w>"]
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
MEAN, STD = (0.25, 0.5, 0.75), (0.5, 0.25, 0.2)


def bert(folder: Path, words: int = 20) -> Any:
    """BERT's tokenizer, of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"word{number}" for number in range(words - 5))]))
    return transformers.BertTokenizer.from_pretrained(str(folder))


def byte_pairs() -> Any:
    vocab = {word: number for number, word in enumerate([*WORDS, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[("r", "e"), ("re", "d</w>")])


def clip_config(side: int = 32) -> transformers.CLIPConfig:
    text = {"vocab_size": 14, "max_position_embeddings": 16, "bos_token_id": 12, "eos_token_id": 13}
    return transformers.CLIPConfig(
        text_config={**TOWER, **text},
        vision_config={**TOWER, "image_size": side, "patch_size": 8},
        projection_dim=16,
    )


def clip_folder(folder: Path, *, processor: dict[str, Any] | None, side: int = 32) -> Path:
    """What transformers 5 writes of a CLIP: tokenizer.json alone, and the processor's settings."""
    torch.manual_seed(0)
    transformers.CLIPModel(clip_config(side)).save_pretrained(folder)
    if processor is None:
        byte_pairs().save_pretrained(folder)
    else:
        images = transformers.CLIPImageProcessor(**processor)
        transformers.CLIPProcessor(images, byte_pairs()).save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    return folder


def settings_of(task: str, config: Path | None = None, **given: Any) -> RunSettings:
    return read_settings(find_task(task).settings, config, given)


def resolve(task: str, path: Path, **given: Any) -> tuple[Any, list[str]]:
    return resolved(find_task(task), settings_of(task, **given), path)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Where the generated images and captions are."""
    data = runs.copied("retrieval", tmp_path_factory.mktemp("data") / "data")
    roots = {name: value for name, value in data.settings.items() if name.endswith("_root")}
    return {**roots, "device": "cpu", "num_workers": 0, "batch_size_test": 16, "examples": 0}


def test_a_small_clip_of_transformers_is_evaluated_as_its_folder_says(
    tmp_path: Path, retrieval: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clip_folder(
        tmp_path / "clip",
        processor={"size": {"shortest_edge": 40}, "crop_size": 32, "image_mean": MEAN, "image_std": STD, "resample": 2},
    )
    task = find_task("retrieval-clip")
    done = evaluate_checkpoint(
        task, settings_of(task.name, **retrieval, pretrained=str(folder), output_dir=tmp_path / "e")
    )
    assert done is not None
    assert "image_size=32" in capsys.readouterr().out
    found, _ = resolve(task.name, folder, **retrieval)
    assert (found.image_size, found.mean, found.std, found.interpolation) == (32, MEAN, STD, "bilinear")
    assert (found.resize, found.crop_ratio, found.tokenizer) == ("crop", 0.8, str(folder))
    library = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    image = Image.effect_noise((60, 48), 90).convert("RGB")
    theirs = library.image_processor(image, return_tensors="pt")["pixel_values"][0]
    ours = eval_transform(found.image_size, found.images)(image)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)
    texts = ["a red b", "c"]
    ids = task.collate(found).tokenize(texts)["input_ids"]
    assert ids[0].tolist() == library.tokenizer(texts[0])["input_ids"]
    assert task.load(folder, found).config.image_size == 32


def test_a_tokenizer_json_alone_is_read_as_it_is(tmp_path: Path) -> None:
    byte_pairs().save_pretrained(tmp_path)
    found = load_clip_tokenizer(tmp_path)
    assert (found.begin, found.end, len(found)) == (12, 13, 14)
    assert found(["a red"], 16)["input_ids"].tolist() == [byte_pairs()("a red")["input_ids"]]


def test_what_is_given_beats_what_the_checkpoint_says_and_is_told(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip", processor={"size": {"shortest_edge": 32}, "crop_size": 32})
    found, notes = resolve("retrieval-clip", folder, image_size=48, resize="squash", tokenizer=str(folder))
    assert (found.image_size, found.resize) == (48, "squash")
    described = "\n".join(notes)
    assert f"image_size=48 was given, and replaces 32 of {folder};" in described and "are resized" in described
    assert f"replaces crop of {folder}." in described
    assert "tokenizer" not in described
    model = find_task("retrieval-clip").load(folder, found)
    assert model.config.image_size == 48
    same, notes = resolve("retrieval-clip", folder, image_size=32)
    assert same.image_size == 32
    assert not any("was given" in note for note in notes)


def test_a_file_of_settings_beats_the_checkpoint(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip", processor=None)
    (tmp_path / "my.yaml").write_text("image_size: 64\n")
    found, notes = resolved(find_task("retrieval-clip"), settings_of("retrieval-clip", tmp_path / "my.yaml"), folder)
    assert found.image_size == 64
    assert any("image_size=64 was given" in note for note in notes)


def test_the_models_size_beats_that_of_a_processor_which_its_model_does_not_take(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip", processor={})  # of 224 pixels
    found, notes = resolve("retrieval-clip", folder)
    assert (found.image_size, found.resize) == (32, "crop")
    assert any("prepared with 224 pixels, but the model sees 32" in note for note in notes)


def blip_folder(folder: Path) -> Path:
    tokenizer = bert(folder / "vocabulary")
    text = {"vocab_size": 22, "max_position_embeddings": 40, "bos_token_id": 20, "sep_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**TOWER, **text, "encoder_hidden_size": 32},
        vision_config={**TOWER, "image_size": 48, "patch_size": 16},
        image_text_hidden_size=16,
    )
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 48, "width": 48}, image_mean=MEAN)
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_blip_of_transformers(tmp_path: Path) -> None:
    folder = blip_folder(tmp_path / "blip")
    found, _ = resolve("caption", folder)
    assert (found.image_size, found.mean, found.resize) == (48, MEAN, "squash")
    model: Any = find_task("caption").load(folder, found)
    assert (model.config.image_size, model.config.vocab_size) == (48, 22)
    other = bert(tmp_path / "other", words=19)
    assert len(other) == 19
    with pytest.raises(SettingError, match=r"The model's vocabulary has 22 words, and the tokenizer .*other' has 21"):
        find_task("caption").load(folder, resolve("caption", folder, tokenizer=str(tmp_path / "other"))[0])
    bert(tmp_path / "words", words=20)
    (tmp_path / "words" / "vocab.txt").write_text((tmp_path / "words" / "vocab.txt").read_text().replace("word3", "x"))
    _, notes = resolve("caption", folder, tokenizer=str(tmp_path / "words"))
    assert any("replaces the one of" in note for note in notes)


def vit_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TOWER, image_size=32, patch_size=8, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def timm_hub_folder(folder: Path, **arguments: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, **arguments}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    timm.models.save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)
    return folder


def timm_saved_folder(folder: Path) -> Path:
    """As `upop.save` writes it, compressed."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
    )
    groups = upop.find_groups(model)
    return upop.save(upop.shrink(model, {group.name: range(group.size // 2) for group in groups}), folder)


@pytest.mark.parametrize(
    ("make", "mean", "interpolation", "resize", "ratio"),
    [
        (vit_folder, (0.5, 0.5, 0.5), "bilinear", "squash", 1.0),
        (timm_hub_folder, (0.5, 0.5, 0.5), "bicubic", "crop", 0.9),
        (timm_saved_folder, (0.5, 0.5, 0.5), "bicubic", "crop", 0.9),
    ],
)
def test_classifiers_of_other_libraries(
    tmp_path: Path, make: Callable[[Path], Path], mean: Any, interpolation: str, resize: str, ratio: float
) -> None:
    folder = make(tmp_path / "model")
    data = runs.copied("classification", tmp_path / "data").settings
    for label in ("train", "val", "test"):  # as many classes as the model has
        for extra in sorted((Path(data["data_path"]) / label).iterdir())[3:]:
            for image in extra.iterdir():
                image.unlink()
            extra.rmdir()
    task = find_task("classification")
    settings = settings_of(
        task.name, **data, pretrained=str(folder), output_dir=tmp_path / "e", device="cpu", num_workers=0
    )
    found, _ = resolved(task, settings, folder)
    assert (found.image_size, found.mean, found.interpolation, found.resize) == (32, mean, interpolation, resize)
    assert found.crop_ratio == pytest.approx(ratio)
    model = task.adapt(task.load(folder, found), found, training=False)[0].eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = upop.load(folder)(images) if make is not timm_hub_folder else None
        if theirs is None:
            theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        torch.testing.assert_close(model(images), getattr(theirs, "logits", theirs), atol=1e-5, rtol=1e-4)
    assert evaluate_checkpoint(task, settings) is not None


def test_a_timm_model_that_ours_is_not_is_refused(tmp_path: Path) -> None:
    folder = timm_hub_folder(tmp_path / "registers", reg_tokens=4)
    with pytest.raises(CheckpointError, match=r"reg_tokens=4.*own classifier.*upop\.Compression"):
        resolve("classification", folder)


VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 14, "width": 32, "heads": 2, "layers": 1}


def open_clip_model(*, quick: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return CLIP(16, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), quick_gelu=quick).eval()


def open_clip_hub_folder(folder: Path, *, quick: bool = True, resize: str = "squash") -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(open_clip_model(quick=quick).state_dict(), folder / "open_clip_model.safetensors")
    described = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": quick},
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": resize},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    byte_pairs().save_pretrained(folder)
    return folder


def open_clip_saved_folder(folder: Path) -> Path:
    model = open_clip_model()
    open_clip.model.set_model_preprocess_cfg(
        model, {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash", "size": 32}
    )
    upop.save(model, folder, tokenizer=byte_pairs())
    return folder


@pytest.mark.parametrize("make", [open_clip_hub_folder, open_clip_saved_folder])
def test_clip_of_open_clip(tmp_path: Path, make: Callable[[Path], Path], retrieval: dict[str, Any]) -> None:
    folder = make(tmp_path / "model")
    task = find_task("retrieval-clip")
    found, _ = resolve(task.name, folder)
    assert (found.image_size, found.mean, found.std) == (32, MEAN, STD)
    assert (found.interpolation, found.resize, found.tokenizer) == ("bilinear", "squash", str(folder))
    model, theirs = task.load(folder, found), open_clip_model()
    images, ids = torch.randn(2, 3, 32, 32), task.collate(found).tokenize(["a red", "b"])["input_ids"]
    padded = torch.zeros(2, 16, dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.encode_text(ids), theirs.encode_text(padded), atol=1e-5, rtol=1e-4)
    given = {**retrieval, "pretrained": str(folder), "output_dir": tmp_path / "e"}
    assert evaluate_checkpoint(task, settings_of(task.name, **given)) is not None


def test_an_open_clip_that_ours_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quick_gelu=False, and upop's own CLIP True"):
        resolve("retrieval-clip", open_clip_hub_folder(tmp_path / "m", quick=False))


def test_a_published_file_says_its_size_by_its_positions(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path)
    _, settings = runs.nlvr(config)
    path = save_official("nlvr", upop.load(str(settings.pretrained)), tmp_path / "dense.pth")
    found, _ = resolve("nlvr", path)
    assert found.image_size == 32
    found, notes = resolve("nlvr", path, image_size=64)
    assert found.image_size == 64
    assert any("position embeddings are resized" in note for note in notes)


@pytest.mark.slow
def test_our_folder_takes_images_of_another_size(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path)
    task, settings = runs.nlvr(config, image_size=64, output_dir=tmp_path / "e")
    done = evaluate_checkpoint(task, settings)
    assert done is not None
    assert task.load(Path(str(settings.pretrained)), settings).config.image_size == 64
    with pytest.raises(UPopError, match="cannot take images of 8 pixels"):
        evaluate_checkpoint(task, settings.model_copy(update={"image_size": 8}))


def test_settings_in_a_checkpoint_are_checked(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path)
    _, settings = runs.nlvr(config)
    file = Path(str(settings.pretrained)) / "upop.json"
    described = json.loads(file.read_text())
    for wrong in ({"mean": [1, 2]}, {"std": [0, 1, 1]}, {"interpolation": "cubist"}, {"crop_ratio": 7}, {"resize": {}}):
        file.write_text(json.dumps({**described, "preparation": {"task": "nlvr", **wrong}}))
        with pytest.raises(CheckpointError, match=f"The input preparation in .* is not valid:\n  {next(iter(wrong))}"):
            resolve("nlvr", file.parent)
    file.write_text(
        json.dumps({**described, "preparation": {"task": "nlvr", "output_dir": "/", "ratio": 0.9, "no": 1}})
    )
    assert resolve("nlvr", file.parent)[0].ratio == 0.5  # nothing but what belongs to the inputs


def test_a_model_of_another_task_gives_what_both_have_in_common(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path)
    _, settings = runs.nlvr(config)
    file = Path(str(settings.pretrained)) / "upop.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "preparation": {"task": "nlvr", "mean": MEAN, "prompt": "no"}}))
    found, _ = resolve("caption", file.parent)
    assert (found.image_size, found.mean, found.prompt) == (32, MEAN, "a picture of ")
    found, _ = resolve("segmentation", file.parent)
    assert (found.image_size, found.statistics) == (512, (MEAN, (0.5, 0.5, 0.5)))


def test_a_run_from_a_foreign_model_keeps_how_its_inputs_are_prepared(
    tmp_path: Path, retrieval: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = clip_folder(
        tmp_path / "clip", processor={"size": {"shortest_edge": 32}, "crop_size": 32, "image_mean": MEAN}
    )
    task = find_task("retrieval-clip")
    given = {**retrieval, "max_epoch": 1, "batch_size_train": 16, "queue_size": 64, "augment": False}
    done = train(task, settings_of(task.name, **given, pretrained=str(folder), output_dir=tmp_path / "run"))
    assert done is not None
    described = json.loads((tmp_path / "run/best/upop.json").read_text())["preparation"]
    assert (described["image_size"], described["mean"], described["resize"]) == (32, list(MEAN), "crop")
    again = evaluate_checkpoint(
        task, settings_of(task.name, **retrieval, pretrained=str(tmp_path / "run/best"), output_dir=tmp_path / "e")
    )
    assert again is not None
    assert again.models[0].metrics == done.models[0].metrics
    copied = upop.save(upop.load(tmp_path / "run/best"), tmp_path / "copy")
    assert json.loads((copied / "upop.json").read_text())["preparation"] == described


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            Images(resize="crop", crop_ratio=0.5),
            lambda image: tvf.center_crop(tvf.resize(image, 16, interpolation=3), 8),
        ),
        (
            Images(resize="squash", crop_ratio=0.5),
            lambda image: tvf.center_crop(tvf.resize(image, [16, 16], interpolation=3), 8),
        ),
        (Images(resize="pad"), lambda image: tvf.pad(tvf.resize(image, [4, 8], interpolation=3), [0, 2])),
    ],
)
def test_ways_to_resize(how: Images, expected: Callable[[Image.Image], Image.Image]) -> None:
    image = Image.effect_noise((40, 20), 90).convert("RGB")
    found = eval_transform(8, how)(image)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (how.mean, how.std))
    torch.testing.assert_close(found, (tvf.pil_to_tensor(expected(image)) / 255 - mean) / std)


def test_the_side_that_is_resized_to_is_exact() -> None:
    assert [Images(crop_ratio=224 / side).resized_to(224) for side in range(224, 512)] == list(range(224, 512))
    assert Images(crop_ratio=0.9).resized_to(224) == 248
