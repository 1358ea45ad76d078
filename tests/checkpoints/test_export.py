"""Compressed models leave for other runtimes, and compute the same there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runs
import upop
from pruning.families import randomise
from tiers import mostly_slow
from upop.checkpoints.export import graphs_of
from upop.errors import SettingError, VerificationError
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.classifier import ClassifierConfig, build_classifier
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig

ONE_BLOCK = {"vision_depth": 1, "text_depth": 1}  # tracing is slow
SIZES: dict[str, Any] = {**runs.TOWERS, **ONE_BLOCK, "patch_size": 16, "image_size": 32}
SIZES |= {"max_positions": 32, "vocab_size": 120}
CLIP = {name: value for name, value in SIZES.items() if name != "dropout"}
VISION = {name: value for name, value in SIZES.items() if name.startswith(("vision", "image", "patch"))}
CONTRAST = {"embed_dim": 16, "queue_size": 20}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "caption": lambda: BlipCaption(CaptionConfig(**SIZES)),
    "vqa": lambda: BlipVqa(VqaConfig(**SIZES)),
    "nlvr": lambda: BlipNlvr(NlvrConfig(**SIZES, merge_from=0)),
    "retrieval": lambda: BlipRetrieval(RetrievalConfig(**SIZES, **CONTRAST)),
    "clip": lambda: ClipRetrieval(ClipConfig(**CLIP, **CONTRAST)),
    "classification": lambda: build_classifier(ClassifierConfig(**VISION, classes=5)),
    "segmentation": lambda: Segmenter(
        SegmenterConfig(
            **VISION, decoder_width=24, decoder_depth=1, decoder_heads=2, decoder_mlp=48, classes=4, encoder_classes=5
        )
    ),
}


def compressed(name: str) -> nn.Module:
    """A model of random weights that keeps another number of entries in every unit."""
    model = MODELS[name]()
    randomise(model, 3)
    units = upop.find_units(model)
    kept = {unit.name: range(0, unit.size, 2 + place % 2) for place, unit in enumerate(units)}
    return upop.shrink(model, kept).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], tuple[nn.Module, Path]]:
    """Export a model, once in each format; return it and its folder."""

    @functools.cache
    def made(name: str, format: Any) -> tuple[nn.Module, Path]:
        if format == "onnx":
            pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
        model = compressed(name)
        return model, upop.export(model, tmp_path_factory.mktemp(name) / "out", format)  # checks every graph

    return made


# An ONNX file is made of the program that torch-export writes.
@pytest.mark.parametrize(
    ("name", "format"),
    mostly_slow(
        [*((name, "onnx") for name in MODELS), ("clip", "torch-export"), ("nlvr", "torch-export")],
        *(("caption", "onnx"), ("classification", "onnx"), ("segmentation", "onnx"), ("clip", "torch-export")),
    ),
)
def test_graphs_compute_what_the_model_does(
    name: str, format: str, exported: Callable[[str, Any], tuple[nn.Module, Path]]
) -> None:
    model, folder = exported(name, format)
    described = json.loads((folder / "export.json").read_text())
    assert described["format"] == format
    assert set(described["graphs"]) == set(graphs_of(model))
    for graph in described["graphs"].values():
        assert (folder / graph["file"]).stat().st_size > 0
        assert graph["largest_difference"] <= 1e-4
    assert not model.training


def test_a_caption_is_written_word_by_word_outside_torch(
    exported: Callable[[str, Any], tuple[nn.Module, Path]],
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    model: Any
    model, folder = exported("caption", "onnx")
    vision, decoder = (
        runtime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("vision", "decoder")
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states = vision.run(None, {"images": images.numpy()})[0]
    prompt = [5, 6, 7]
    said = torch.tensor([[model.begin, *prompt]] * 2)
    while said.shape[1] < 9:
        inputs = {"input_ids": said.numpy(), "attention_mask": torch.ones_like(said).numpy(), "states": states}
        logits = torch.from_numpy(decoder.run(None, inputs)[0])
        said = torch.cat([said, logits[:, -1].argmax(1, keepdim=True)], dim=1)
    # No text can end: 119 is none of the words that come up, so both ways say as many.
    expected = model.generate(images, prompt, 119, max_length=9, min_length=9, num_beams=1)
    assert torch.equal(said, expected)


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"'onxx' is not known \(did you mean 'onnx'"):
        upop.export(compressed("nlvr"), tmp_path / "out", "onxx")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"A Linear cannot be exported by upop, which knows .* blip-caption"):
        upop.export(nn.Linear(2, 2), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("clip")
    real = torch.export.load

    class Spoilt:
        def __init__(self, program: Any) -> None:
            self._program = program

        def module(self) -> Callable[..., Tensor]:
            run = self._program.module()
            return lambda *inputs: run(*inputs) * 1.001

    monkeypatch.setattr(torch.export, "load", lambda file: Spoilt(real(file)))
    with pytest.raises(VerificationError, match="graph 'image' does not compute what the model does"):
        upop.export(model, tmp_path / "out", "torch-export")
    assert not any(tmp_path.iterdir())
