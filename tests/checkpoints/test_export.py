"""Compressed models leave for other runtimes, and compute the same there."""

from __future__ import annotations

import errno
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

import runs
import upop
from pruning.families import randomise
from tiers import mostly_slow, since
from upop.checkpoints.export.graphs import own_graphs, sample_inputs
from upop.cli.app import app
from upop.errors import RunFolderError, SettingError, VerificationError
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.classifier import ClassifierConfig, build_classifier
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig

pytestmark = since("torch", "2.15", "its torch.export fails on most models")

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
    """A model of random weights that keeps another number of channels in every group."""
    model = MODELS[name]()
    randomise(model, 3)
    groups = upop.find_groups(model)
    kept = {group.name: range(0, group.size, 2 + place % 2) for place, group in enumerate(groups)}
    return upop.shrink(model, kept).eval()


class Determinant(nn.Module):
    """Computes what ONNX has no operation for."""

    def __init__(self, *, asked: bool = False) -> None:
        super().__init__()
        self.layer, self.asked = nn.Linear(4, 4), asked

    def forward(self, x: Tensor) -> Tensor:
        if self.asked and x.shape[-1] != 1234:
            raise ValueError("no such input is known")
        return torch.linalg.eigvalsh(self.layer(x).unsqueeze(-1) @ self.layer(x).unsqueeze(-2))


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
        ("clip", "torch-export"),  # ONNX is quick in the caption that is written below
    ),
)
def test_graphs_compute_what_the_model_does(
    name: str, format: str, exported: Callable[[str, Any], tuple[nn.Module, Path]]
) -> None:
    model, folder = exported(name, format)
    described = json.loads((folder / "export.json").read_text())
    assert described["format"] == format
    assert set(described["graphs"]) == set(own_graphs(model) or ())
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
    with pytest.raises(SettingError, match=r"quantize='int8'.*openvino.*'torch"):
        upop.export(compressed("nlvr"), tmp_path / "out", "torch-export", quantize="int8")
    with pytest.raises(SettingError, match=r"one call.*upop\.export\(model, folder, example="):
        upop.export(Determinant(asked=True), tmp_path / "out")
    with pytest.raises(SettingError, match=r"input2 has shape \(1, 4\).* Give a batch of 2 or more"):
        upop.export(nn.Bilinear(4, 4, 2), tmp_path / "out", example=(torch.ones(2, 4), torch.ones(1, 4)))
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
    with pytest.raises(VerificationError, match=r"graph 'image'.*compute"):
        upop.export(model, tmp_path / "out", "torch-export")
    assert not any(tmp_path.iterdir())


def test_a_program_that_the_disk_has_no_room_for_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = nn.Linear(4, 2), torch.randn(2, 4)
    file = upop.export(model, tmp_path / "out", "torch-export", example=example) / "model.pt2"
    before = file.read_bytes()

    def full(path: Path, content: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFolderError, match=r"No space left on device\. .*there before"):
        upop.export(model, tmp_path / "out", "torch-export", example=example)
    assert file.read_bytes() == before


def of_library(name: str) -> nn.Module:
    """A tiny model of a library, of which a part of every group is cut."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48}
    model: nn.Module
    if name == "torch":
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    elif name == "timm":
        # Its attention is a class of its own, whose forward has widths.
        model = timm.create_model("beit_base_patch16_224", depth=1, img_size=32, embed_dim=48, num_heads=4)
    elif name == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60, pad_token_id=0)
        model = transformers.LlamaForCausalLM(config)
    elif name == "t5":
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=60)
        model = transformers.T5ForConditionalGeneration(config)
    elif name == "llava":
        text_config = transformers.LlamaConfig(**sizes, vocab_size=60)
        vision_config = transformers.CLIPVisionConfig(**{**sizes, "num_hidden_layers": 2}, image_size=32, patch_size=16)
        both = transformers.LlavaConfig(text_config=text_config, vision_config=vision_config, image_token_index=59)
        model = transformers.LlavaForConditionalGeneration(both)
    else:
        vision = {**sizes, "image_size": 32, "patch_size": 16}
        text = {**sizes, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 59}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    groups = upop.find_groups(model.eval())
    return upop.shrink(model, {group.name: range(0, group.size, 2 + place % 2) for place, group in enumerate(groups)})


INPUTS = {
    "torch": {"src": ["batch", "tokens", 16]},
    "timm": {"x": ["batch", 3, 32, 32]},
    "llama": {"input_ids": ["batch", "tokens"], "attention_mask": ["batch", "tokens"]},
    "t5": {
        "input_ids": ["batch", "tokens"],
        "decoder_input_ids": ["batch", "decoder_input_ids_1"],
        "attention_mask": ["batch", "tokens"],
    },
    "clip": {
        "input_ids": ["batch", "tokens"],
        "pixel_values": ["batch", 3, 32, 32],
        "attention_mask": ["batch", "tokens"],
    },
}


@pytest.mark.parametrize(
    ("name", "format"),
    mostly_slow(
        [(name, format) for name in INPUTS for format in ("onnx", "openvino", "torch-export")],
        ("torch", "openvino"),
    ),
)
def test_a_model_of_any_library_computes_the_same_elsewhere(name: str, format: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra `export` is not installed")
    folder = upop.export(of_library(name), tmp_path / "out", format)
    graph = json.loads((folder / "export.json").read_text())["graphs"]["model"]
    assert graph["inputs"] == INPUTS[name]
    assert graph["largest_difference"] <= 1e-4  # in batches of 1 and 3, and texts of 9 words; it was traced with others


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_model_whose_code_counts_images_takes_as_many_as_its_example_has(format: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra `export` is not installed")
    ids = torch.tensor([[59, 59, 59, 59, 1, 5, 7]])
    example = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    folder = upop.export(of_library("llava"), tmp_path / "out", format, example=example)
    graph = json.loads((folder / "export.json").read_text())["graphs"]["model"]
    assert graph["inputs"]["input_ids"] == [1, "tokens"]
    assert graph["inputs"]["pixel_values"] == [1, 3, 32, 32]
    assert graph["largest_difference"] <= 1e-4


@pytest.mark.parametrize("format", mostly_slow(["onnx", "openvino"], "onnx"))
def test_a_model_of_ones_own_runs_elsewhere_in_any_batch_and_in_whole_numbers(format: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    openvino = pytest.importorskip("openvino", reason="the extra `export` is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).eval()
    example = torch.randn(2, 5, 64)
    upop.shrink(model, {upop.find_groups(model, example=example)[0].name: range(128)})
    samples = [torch.randn(1, 4, 64) for _ in range(16)]
    ways: dict[str, dict[str, Any]] = {
        "float": {},
        "dynamic": {"quantize": "int8"},
        "static": {"quantize": "int8", "samples": samples},
    }
    folders = {kind: upop.export(model, tmp_path / kind, format, example=example, **how) for kind, how in ways.items()}
    x = torch.randn(7, 3, 64)
    expected = model(x).detach()
    for kind, folder in folders.items():
        if format == "openvino":
            exact = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors compute in bfloat16 otherwise
            compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", exact)
            found = torch.from_numpy(compiled(x.numpy())[0].copy())
        else:
            session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        off = float((found - expected).abs().max() / expected.abs().max())
        assert off < (1e-5 if kind == "float" else 0.1)
        assert kind == "float" or off > 1e-5  # it does compute with whole numbers
        held = json.loads((folder / "export.json").read_text())["graphs"]["model"]
        if kind != "float":
            before, after = held["quantized"]["bytes"]
            # the description of an OpenVINO graph is as long as these weights
            assert after < (before if format == "openvino" else before / 2)
            assert held["quantized"]["difference"] < 0.1
        assert [path.name for path in folder.glob("*.onnx*")] == ([] if format == "openvino" else ["model.onnx"])
    with pytest.raises(SettingError, match=r"A sample has 2 tensors; the graph takes input\."):
        upop.export(model, tmp_path / "out", example=example, quantize="int8", samples=[(x, x)])
    with pytest.raises(SettingError, match=r"samples calibrate quantize='int8', but there are none"):
        upop.export(model, tmp_path / "out", example=example, quantize="int8", samples=[])


@pytest.mark.slow
def test_ranges_of_graphs_that_follow_each_other_are_measured_on_what_the_first_gives(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    model = compressed("caption")
    samples = [
        {"images": torch.randn(1, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in torch.randint(1, 120, (4, 1, 5))
    ]
    folder = upop.export(model, tmp_path / "out", quantize="int8", samples=samples)
    graphs = json.loads((folder / "export.json").read_text())["graphs"]
    assert {graph["quantized"]["ranges"] for graph in graphs.values()} == {"of 4 samples"}
    assert all(graph["quantized"]["difference"] < 0.2 for graph in graphs.values())
    with pytest.raises(SettingError, match=r"has the graphs vision, decoder: .*sample.*mapping"):
        upop.export(model, tmp_path / "other", quantize="int8", samples=[samples[0]["images"]])
    with pytest.raises(SettingError, match=r"A sample has no attention_mask; the graph takes input_ids"):
        upop.export(model, tmp_path / "other", quantize="int8", samples=[{**samples[0], "attention_mask": None}])


def test_two_images_of_a_sample_are_told_apart() -> None:
    model = compressed("nlvr")
    ids = torch.tensor([[5, 6, 7]])
    pair = torch.randn(2, 3, 32, 32)
    sample = {"images": pair, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = sample_inputs(model, own_graphs(model) or {}, sample)["model"]
    assert list(given) == ["images0", "images1", "input_ids", "attention_mask"]
    assert torch.equal(torch.cat([given["images0"], given["images1"]]), pair)


def test_an_operation_that_onnx_lacks_is_refused_and_torch_export_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    with pytest.raises(SettingError, match=r"no operation for aten\.\S+\. Write it with .*torch-export"):
        upop.export(Determinant(), tmp_path / "out", example=torch.randn(2, 4))
    assert not any(tmp_path.iterdir())
    assert (
        upop.export(Determinant(), tmp_path / "out", "torch-export", example=torch.randn(2, 4)) / "model.pt2"
    ).is_file()


def test_the_command_writes_a_saved_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    upop.save(of_library("llama"), tmp_path / "small")
    words = ["export", str(tmp_path / "small"), "--out", str(tmp_path / "out"), "--quantize", "int8"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert "model(input_ids (batch, tokens), attention_mask (batch, tokens)) -> logits; largest" in done.output
    assert "int8: " in done.output
    done = CliRunner().invoke(app, [*words[:4], "--samples", "4", "--overwrite"])
    assert "--samples needs --quantize int8" in str(done.exception)


def decoder() -> Any:
    """A cut decoder whose layers keep different numbers of key-value groups and neurons."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, intermediate_size=48, vocab_size=60, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    randomise(model, 3)
    kept = {"layers.0.self_attn": range(3), "layers.1.self_attn": [2], "layers.0.mlp": range(20)}
    return upop.shrink(model.eval(), {f"model.{name}": list(channels) for name, channels in kept.items()})


def continued(run: Callable[[dict[str, Any]], dict[str, Any]], folder: Path, ids: Tensor, words: int) -> Tensor:
    """Generate greedily with a graph that takes and gives its cache."""
    inputs = json.loads((folder / "export.json").read_text())["graphs"]["model"]["inputs"]
    cache = {
        name: torch.zeros(len(ids), axes[1], 0, axes[3]).numpy() for name, axes in inputs.items() if "past" in name
    }
    new, count = ids, ids.shape[1]
    for _ in range(words):
        mask = torch.ones_like(ids)
        positions = torch.arange(count - new.shape[1], count).expand_as(new)
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        found = run({**{name: value.numpy() for name, value in given.items()}, **cache})
        cache = {name.replace("present", "past_key_values"): found[name] for name in found if name != "logits"}
        new = torch.from_numpy(found["logits"])[:, -1:].argmax(-1)
        ids, count = torch.cat([ids, new], 1), count + 1
    return ids


@pytest.mark.parametrize("format", mostly_slow(["onnx", "openvino"], "onnx"))
def test_a_cut_decoder_generates_with_its_cache_outside_torch(format: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    model = decoder()
    folder = upop.export(model, tmp_path / "out", format, cache=True)
    graph = json.loads((folder / "export.json").read_text())["graphs"]["model"]
    assert [graph["inputs"][f"past_key_values.{layer}.key"] for layer in (0, 1)] == [
        ["batch", heads, "past_tokens", 4] for heads in (3, 1)
    ]
    assert graph["largest_difference"] <= 1e-4
    if format == "onnx":
        session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            return dict(zip(names, session.run(names, inputs), strict=True))
    else:
        openvino = pytest.importorskip("openvino", reason="the extra `export` is not installed")
        compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            found = compiled(inputs)
            return {name: found[name].copy() for name in graph["outputs"]}

    ids = torch.tensor([[1, 5, 9, 3], [2, 7, 7, 8], [4, 4, 30, 59]])
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(continued(run, folder, ids, 6), expected)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("timm", "not a transformers model that generates"),
        ("clip", "not a transformers model that generates"),
        ("t5", "has an encoder"),
    ],
)
def test_a_cache_is_refused_where_there_is_none(name: str, why: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    with pytest.raises(SettingError, match=f"{why}.*Export it without"):
        upop.export(of_library(name), tmp_path / "out", cache=True)
    assert not any(tmp_path.iterdir())
