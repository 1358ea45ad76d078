"""Everything of the library that reads what others wrote, by its public entry: each is given bad inputs of its kind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import nn
from typer.main import get_command

import runs
import upop
from fuzz import mutations as m
from fuzz.engine import REFUSED, Case, Draw, Reader, Wrong
from malformed import annotations, images
from malformed.checkpoints import saved
from report import pages
from upop.checkpoints import WEIGHTS, load_official, read_weights, save_official
from upop.checkpoints.convert import read_model, to_transformers
from upop.cli import app as cli
from upop.cli import published, published_deit, published_segmenter
from upop.cli import recipes as cli_recipes
from upop.data.classification import ImageFolderDataset
from upop.data.clip_tokenizer import load_clip_tokenizer
from upop.data.segmentation import NAMES, SegmentationDataset, class_names
from upop.data.tokenizer import load_tokenizer
from upop.errors import UPopError
from upop.report.page import comparison_page, run_page
from upop.report.run import read_run
from upop.runs import verbs
from upop.runs.checkpoints import Checkpoints
from upop.settings import read_settings
from upop.tasks import TASKS, find_task

READERS: dict[str, Reader] = {}
"""Name -> what prepares it."""


def reader(name: str) -> Callable[[Reader], Reader]:
    """Add a reader to the table."""

    def add(make: Reader) -> Reader:
        READERS[name] = make
        return make

    return add


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _put(draw: Draw, path: Path, content: bytes) -> None:
    """Write bad content where a file is looked for; or, at times, put something there that is no file to be read."""
    _remove(path)
    match draw.random():
        case chance if chance > 0.03:
            path.write_bytes(content)
        case chance if chance > 0.025:
            path.mkdir()
        case chance if chance > 0.02:
            path.symlink_to(draw.choice(("nowhere", path.name, "/", "/dev/null", "..")))
        case chance if chance > 0.015:
            path.symlink_to(draw.choice(("/dev/zero", "/dev/urandom", "/dev/full", "/proc/self/mem")))
        case chance if chance > 0.01:
            os.mkfifo(path)
        case chance if chance > 0.005:
            path.write_bytes(content)
            os.truncate(path, draw.choice((2**28, 2**33)))  # zeros without end, which take no place on the disk
        case _:
            pass


# Annotations.


def _annotations(kind: str) -> Reader:
    def make(folder: Path) -> Case:
        for name in annotations.IMAGES:
            Image.new("RGB", (8, 8)).save(folder / name)
        row, file = annotations.KINDS[kind], folder / "file.json"

        def case(draw: Draw) -> None:
            _put(draw, file, m.json_file(draw, row.content))
            found = row.read(file, folder)
            if isinstance(found, torch.utils.data.Dataset):
                for number in range(min(len(found), 3)):  # type: ignore[arg-type]
                    _ = found[number]

        return case

    return make


for _kind in annotations.KINDS:
    READERS[f"annotations: {_kind}"] = _annotations(_kind)


# Images.


def _good_images() -> dict[str, bytes]:
    """An image in every format that Pillow writes by itself."""
    found, image = {}, images.image()
    Image.init()
    for form in sorted(Image.SAVE):
        for mode in ("RGB", "L", "P"):
            buffer = io.BytesIO()
            try:
                image.convert(mode).save(buffer, form)
            except Exception:  # it has no such mode, needs another library, or writes no single image
                continue
            found[f"{form} {mode}"] = buffer.getvalue()
    found |= {name: content for name, (content, _, _) in images.ODD.items()}
    found["JPEG with notes"] = images.encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + bytes(40))
    found["TIFF, packed"] = images.encoded(image, "TIFF", compression="tiff_lzw")
    return found


def _image(draw: Draw, good: Mapping[str, bytes]) -> bytes:
    name = draw.choice(sorted(good))
    return m.image_file(draw, good[name], (images.WIDTH, images.HEIGHT))


def _shape_of(image: Image.Image) -> Any:
    if image.mode != "RGB":
        raise Wrong(f"an image of mode {image.mode}")
    return np.asarray(image).shape


@reader("images of annotations")
def _of_annotations(folder: Path) -> Case:
    good = _good_images()
    for name in annotations.IMAGES:
        (folder / name).write_bytes(images.PNG)
    kinds = [name for name in annotations.KINDS if name not in ("ground truth", "answers")]
    samples = {}
    for kind in kinds:
        file = folder / f"{kind}.json"
        file.write_text(json.dumps(annotations.KINDS[kind].content))
        samples[kind] = annotations.KINDS[kind].read(file, folder)

    def case(draw: Draw) -> None:
        _put(draw, folder / annotations.IMAGES[0], _image(draw, good))
        _ = samples[draw.choice(kinds)][0]

    return case


@reader("images of classes")
def _of_classes(folder: Path) -> Case:
    good = _good_images()
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.jpg").write_bytes(images.PNG)
    endings = (".jpg", ".JPEG", ".png", ".webp", ".tif", ".bmp", ".gif", ".ppm")

    def case(draw: Draw) -> None:
        shutil.rmtree(folder / "train" / "a")
        (folder / "train" / "a").mkdir()
        _put(draw, folder / "train" / "a" / f"0{draw.choice(endings)}", _image(draw, good))
        _ = ImageFolderDataset(folder, "train", _shape_of, training=draw.random() < 0.5)[0]  # type: ignore[arg-type]

    return case


@reader("images and maps of labels")
def _of_labels(folder: Path) -> Case:
    good = _good_images()
    for kind in ("images", "annotations"):
        (folder / kind / "training").mkdir(parents=True)
        Image.new("L", (images.WIDTH, images.HEIGHT), 1).save(folder / kind / "training" / "0.png")
    whole = (folder / "images" / "training" / "0.png").read_bytes()
    samples = SegmentationDataset(folder, "training", lambda *both: both, 3)  # type: ignore[arg-type, return-value]
    # Maps are small numbers, of which one too many is an error as well.
    maps = {**good, **{f"map {n}": images.encoded(Image.new("L", (12, 8), n), "PNG") for n in (0, 3, 4, 255)}}

    def case(draw: Draw) -> None:
        bad = draw.choice(("images", "annotations"))
        for kind in ("images", "annotations"):
            path = folder / kind / "training" / "0.png"
            if kind == bad:
                _put(draw, path, _image(draw, maps if kind == "annotations" else good))
            else:
                _restore(path, whole)
        _ = samples[0]

    return case


@reader("names of classes")
def _names(folder: Path) -> Case:
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{n}\t0.1\t1\t1\t1\tthing {n}, object" for n in range(1, 6))]
    good = "\n".join(rows).encode()

    def case(draw: Draw) -> None:
        content = m.damaged(draw, good) if draw.random() < 0.8 else m.whole_file(draw, good)
        _put(draw, folder / NAMES, content)
        class_names(folder, 5)

    return case


# Commands, settings and recipes.

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _called(words: list[str], kind: typer.Typer = cli.app) -> str:
    """Run a command in this process; return whether it was refused."""
    described = io.StringIO()
    code: object = 0
    before = sys.argv
    sys.argv = ["upop", *words]
    try:
        with contextlib.redirect_stdout(described), contextlib.redirect_stderr(described):
            cli.main(kind)
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    text = described.getvalue()
    number = code if isinstance(code, int) else int(code is not None)
    said = f"{shlex.join(words)[:500]!a} ends with {number} and says {text[-800:]!a}"
    if number not in (0, 1, 2):
        raise Wrong(f"exit code {number}: {said}")
    if "Traceback" in text:
        raise Wrong(f"a traceback: {said}")
    if number and "Error" not in text and "Usage" not in text:
        raise Wrong(f"no message: {said}")
    if found := _CONTROL.search(text):
        raise Wrong(f"the control character {found[0]!a} is shown: {said}")
    return REFUSED if number else ""


@contextlib.contextmanager
def _without_runs() -> Any:
    """Commands that read all that they are given, and then do not start what takes long."""
    names = {
        verbs: ("train", "compress", "evaluate_checkpoint"),
        cli_recipes: ("compress", "evaluate_checkpoint"),
    }
    names |= dict.fromkeys((published, published_deit, published_segmenter), ("compress", "evaluate_checkpoint"))
    kept = [
        (module, name, getattr(module, name))
        for module, all_of in names.items()
        for name in all_of
        if hasattr(module, name)
    ]
    for module, name, _ in kept:
        setattr(module, name, lambda task, settings: settings.to_yaml())
    try:
        yield
    finally:
        for module, name, was in kept:
            setattr(module, name, was)


def _settings(task: str) -> Reader:
    def make(folder: Path) -> Case:
        kind = find_task(task).settings
        # What a run writes down itself: every key is there.
        content = json.loads(json.dumps(kind(**_roots(kind)).model_dump(mode="json")))
        file = folder / "settings.yaml"

        def case(draw: Draw) -> str:
            fewer = {name: value for name, value in content.items() if draw.random() < 0.3} or content
            _put(draw, file, m.yaml_file(draw, fewer))
            with _without_runs():
                return _called([draw.choice(("train", "compress", "evaluate")), task, "--config", str(file)])

        return case

    return make


def _roots(kind: Any) -> dict[str, Any]:
    return {name: "data" for name in kind.model_fields if name.endswith("_root") or name == "data_path"}


for _task in TASKS:
    READERS[f"settings: {_task}"] = _settings(_task)


@reader("recipes")
def _recipes(folder: Path) -> Case:
    import yaml

    root = Path(__file__).parents[2]
    good = yaml.safe_load((root / "configs" / "recipes.yaml").read_text())[:6]
    shutil.copytree(root / "configs", folder / "configs")
    file = folder / "recipes.yaml"

    def case(draw: Draw) -> str:
        _put(draw, file, m.yaml_file(draw, draw.sample(good, 3)))
        name = draw.choice(good)["name"]
        words = draw.choice((["recipes"], ["run", name, "--dry-run"], ["run", name, "--dry-run", "--evaluate"]))
        with _without_runs():
            return _called([*words, "--recipes", str(file)])

    return case


def _flags(node: Any, names: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """Command -> its flags."""
    if getattr(node, "commands", None):
        found: dict[tuple[str, ...], list[str]] = {}
        for name, inner in node.commands.items():
            found |= _flags(inner, (*names, name))
        return found
    flags = [flag for parameter in node.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    return {names: [flag for flag in flags if flag.startswith("-") and "completion" not in flag]}


_WORDS = (
    *(
        "",
        " ",
        "-",
        "--",
        "---",
        "=",
        "--=",
        "--x",
        "-x",
        "-5",
        "0",
        "1",
        "-1",
        "0.5",
        "1.5",
        "50%",
        "0,5",
        "nan",
        "inf",
        "1e9",
    ),
    *(
        "99999999999999999999",
        "true",
        "null",
        "nlvr",
        "caption",
        "nlvrr",
        "all",
        "auto",
        "must",
        "cpu",
        "cuda",
        "tpu",
        "é",
    ),
    *(
        "a=b",
        "=",
        "p=",
        "p=0.5",
        "init_lr=.nan",
        "model={a",
        "model=[1]",
        "x=!!python/name:os.system",
        "seed=1",
        "a=1=2",
    ),
    *(
        "[bold]",
        "[/]",
        "\x1b[31m",
        "\ud83d\ude00",
        "\udcff",
        "a\nb",
        "\u202e",
        "{0}",
        "%s",
        "$(touch ran)",
        ";touch ran",
        "*",
    ),
    *(
        "/",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/proc/upop",
        "..",
        ".",
        "~",
        "http://",
        "https:///a.pth",
        "http://[x",
        "a" * 300,
    ),
    *("nowhere.pth", "owner/name", "C:\\x", "file:///etc/passwd", "hf-hub:a/b", "--help", "-h"),
)


def _line(draw: Draw, flags: list[str], places: Iterable[str], task: str | None) -> list[str]:
    words = [] if task is None or draw.random() < 0.15 else [task]
    among = [*_WORDS, *places]
    for _ in range(draw.choice((0, 1, 1, 2, 3, 5))):
        flag = draw.choice(flags) if flags and draw.random() < 0.8 else draw.choice(among)
        if draw.random() < 0.1:
            flag = m.damaged_text(draw, flag)
        value = draw.choice(among) if draw.random() < 0.9 else m.damaged_text(draw, draw.choice(among))
        words += draw.choice(([flag, value], [flag, value], [f"{flag}={value}"], [flag], [value, flag]))
    if draw.random() < 0.1:
        draw.shuffle(words)
    if words and draw.random() < 0.1:
        words += words[: draw.randrange(len(words)) + 1]
    # What a shell cannot hand over, and what is no mistake but writes into the user's shell.
    words = [word.replace("\0", "") for word in words]
    return [word for word in words if "completion" not in word]


def _places(folder: Path) -> list[str]:
    """Files and folders that a command line may name."""
    (folder / "text.txt").write_text("this is no image, no model and no settings\n")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"loss": 1.0}\n{"lo')
    (folder / "settings.yaml").write_text("p: 0.5\n")
    _save_tiny("classification", folder / "model")
    return [str(folder / name) for name in ("text.txt", "empty", "run", "settings.yaml", "model", "nothing", "new")]


@reader("command lines")
def _command_lines(folder: Path) -> Case:
    places = _places(folder)
    found = _flags(get_command(cli.app))
    # These would do what they are told: they are given what they cannot use, elsewhere.
    long = {("demo",)}
    verbs = {("train",), ("compress",), ("evaluate",)}
    commands = sorted(set(found) - long)

    def case(draw: Draw) -> str:
        command = draw.choice(commands)
        task = draw.choice(sorted(TASKS)) if command in verbs else None
        words = [*command, *_line(draw, found[command], places, task)]
        if draw.random() < 0.05:
            words = _line(draw, [flag for flags in found.values() for flag in flags], places, None)
            words = [word for word in words if word != "demo"]
        if command == ("data", "shapes"):
            words += ["--size", draw.choice(("1", "2", "0", "x")), "--out", f"made{draw.randrange(3)}"]
        with _without_runs():
            return _called(words)

    return case


@reader("published command lines")
def _published_lines(folder: Path) -> Case:
    places = _places(folder)
    kinds = {
        "nlvr": published.blip_command("nlvr", "configs/nlvr.yaml"),
        "vqa": published.blip_command("vqa", "configs/vqa.yaml"),
        "deit": published_deit.app,
        "segmenter": published_segmenter.app,
    }
    found = {name: next(iter(_flags(get_command(kind)).values())) for name, kind in kinds.items()}
    shutil.copytree(Path(__file__).parents[2] / "configs", folder / "configs")

    def case(draw: Draw) -> str:
        name = draw.choice(sorted(kinds))
        with _without_runs():
            return _called(_line(draw, found[name], places, None), kinds[name])

    return case


# Models and checkpoints.


def _tiny(task: str) -> nn.Module:
    """A tiny dense model of a task, and the vocabulary that it was made for is nobody's."""
    from upop.models import MODELS

    kinds = {"caption": "blip-caption", "nlvr": "blip-nlvr", "vqa": "blip-vqa", "retrieval": "blip-retrieval"}
    kinds |= {"retrieval-clip": "clip-retrieval", "classification": "classifier", "segmentation": "segmenter"}
    sizes = {**runs.TINY[task]["model"], "image_size": 32}
    for name in ("vision_depth", "text_depth", "decoder_depth"):
        if name in sizes:
            sizes[name] = 1
    if task == "nlvr":
        sizes["merge_from"] = 0
    if task == "segmentation":
        sizes["classes"] = 3
    model, config = MODELS[kinds[task]]
    known = set(config.model_fields)
    torch.manual_seed(0)
    given = {**sizes, "vocab_size": 40, "queue_size": 4, "classes": sizes.get("classes", 5), "max_positions": 16}
    return model(config(**{name: value for name, value in given.items() if name in known})).eval()


def _shrunken(model: nn.Module) -> nn.Module:
    groups = upop.find_groups(model)
    return upop.shrink(model, upop.Plan.of(groups, {group.name: range(1, group.size, 2) for group in groups}))


def _save_tiny(task: str, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return upop.save(_shrunken(_tiny(task)), folder)


def _same_weights(model: nn.Module, good: nn.Module) -> None:
    """What is read although something was changed must be the weights that were saved, or say that it is not."""
    mine, wanted = model.state_dict(), good.state_dict()
    for name, value in mine.items():
        if name in wanted and (value.shape != wanted[name].shape or not torch.equal(value, wanted[name])):
            raise Wrong(f"{name} is not what was saved")


def _bad_folder(folder: Path, good: Path, draw: Draw, *described: str) -> tuple[Path, bool]:
    """Write a copy of a model's folder with something bad in it; return it, and whether its weights were left alone."""
    target = folder / "bad"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(good, target)
    names = [name for name in described if (target / name).is_file()]
    if draw.random() < 0.65 and names:
        name = draw.choice(names)
        _put(draw, target / name, m.json_file(draw, json.loads((good / name).read_bytes())))
        return target, True
    if draw.random() < 0.1:
        path = draw.choice(sorted(target.iterdir()))
        path.unlink()
        match draw.randrange(4):
            case 0:
                path.mkdir()
            case 1:
                path.symlink_to("nowhere")
            case 2:
                path.symlink_to(path.name)
            case _:
                pass
        return target, True
    weights = next(iter(sorted(target.glob("*.safetensors"))))
    _put(draw, weights, m.safetensors_file(draw, weights.read_bytes()))
    return target, False


def _folder_of(build: Callable[[Path], Path], *described: str) -> Reader:
    def make(folder: Path) -> Case:
        good = build(folder / "good")
        whole = upop.load(good)

        def case(draw: Draw) -> None:
            bad, weights_are_whole = _bad_folder(folder, good, draw, *described)
            read = draw.choice((upop.load, upop.load, read_model))
            found = read(bad)
            if weights_are_whole and read is upop.load and type(found) is type(whole):
                _same_weights(found, whole)

        return case

    return make


for _task in ("nlvr", "caption", "retrieval-clip", "classification", "segmentation"):
    READERS[f"folder: {_task}"] = _folder_of(lambda folder, task=_task: _save_tiny(task, folder), "upop.json")  # type: ignore[misc]


def _of_timm(folder: Path) -> Path:
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 3}
    return upop.save(_shrunken(timm.create_model("vit_tiny_patch16_224", **sizes).eval()), folder)


def _of_transformers(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return upop.save(
        _shrunken(ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()), folder
    )


def _counterpart(folder: Path) -> Path:
    return upop.save(to_transformers(_tiny("caption")), folder)


def _of_open_clip(folder: Path) -> Path:
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "head_width": 8}
    text = {"context_length": 7, "vocab_size": 50, "width": 24, "heads": 3, "layers": 1}
    return upop.save(_shrunken(CustomTextCLIP(16, vision, text).eval()), folder)


READERS["folder: timm"] = _folder_of(_of_timm, "upop.json")
READERS["folder: transformers"] = _folder_of(_of_transformers, "upop.json", "config.json")
READERS["folder: transformers, BLIP"] = _folder_of(_counterpart, "upop.json", "config.json", "generation_config.json")
READERS["folder: open_clip"] = _folder_of(_of_open_clip, "upop.json")


@reader("folder: transformers, alone")
def _plain_transformers(folder: Path) -> Case:
    good = _of_transformers(folder / "first")
    (good / "upop.json").unlink()
    config = json.loads((good / "config.json").read_text())
    config.pop("quantization_config", None)
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**{**config, "hidden_size": 16})).save_pretrained(folder / "good")
    # Also in parts, with an index that says which tensor is where.
    ViTForImageClassification(ViTConfig(**{**config, "hidden_size": 16})).save_pretrained(
        folder / "parts", max_shard_size="8KB"
    )

    def case(draw: Draw) -> None:
        source = folder / draw.choice(("good", "parts"))
        bad, _ = _bad_folder(folder, source, draw, "config.json", "model.safetensors.index.json")
        found = upop.load(bad)
        if any(not torch.isfinite(value).all() for value in found.state_dict().values() if value.is_floating_point()):
            raise Wrong("the model has numbers that are none")

    return case


@reader("into a model of one's own")
def _into(folder: Path) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    good = upop.save(_shrunken(build()), folder / "good")

    def case(draw: Draw) -> None:
        bad, _ = _bad_folder(folder, good, draw, "upop.json")
        upop.load_into(build(), bad)

    return case


@reader("weights: safetensors")
def _weights(folder: Path) -> Case:
    good = safetensors_bytes({name: value.contiguous() for name, value in _tiny("classification").state_dict().items()})
    path = folder / WEIGHTS

    def case(draw: Draw) -> None:
        _put(draw, path, m.safetensors_file(draw, good))
        read_weights(path)

    return case


@reader("weights: torch")
def _torch_weights(folder: Path) -> Case:
    state = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "n": torch.tensor(3)}
    forms = [saved({"model": state}), saved(state), saved({"model": state, "epoch": 3})]
    old = saved({"model": state}, _use_new_zipfile_serialization=False)
    path = folder / "model.pth"

    def case(draw: Draw) -> None:
        content = m.damaged(draw, old) if draw.random() < 0.2 else m.archive(draw, draw.choice(forms))
        _put(draw, path, m.whole_file(draw, forms[0]) if draw.random() < 0.05 else content)
        read_weights(path)

    return case


def _bad_state(draw: Draw, state: dict[str, torch.Tensor]) -> Any:
    """A state dict with other names, shapes, types or numbers."""
    state = dict(state)
    for _ in range(draw.choice((1, 1, 2, 5))):
        name = draw.choice(sorted(state))
        value = state[name].to_dense() if state[name].is_sparse else state[name]
        if value.is_meta:
            continue
        match draw.randrange(10):
            case 0:
                del state[name]
            case 1:
                state[draw.choice((f"module.{name}", name.upper(), f"{name}x", *m.KEYS))] = state.pop(name)
            case 2:
                other = draw.choice(
                    (torch.int8, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.int64)
                )
                state[name] = value.to(other)
            case 3:
                state[name] = value.flatten()[: draw.randrange(4)] if draw.random() < 0.5 else value[None]
            case 4:
                shape = [max(0, side + draw.choice((-1, 0, 1, 5))) for side in value.shape]
                state[name] = torch.zeros(shape, dtype=value.dtype)
            case 5:
                state[name] = value.t() if value.dim() == 2 else value.reshape(-1)
            case 6:
                spoiled = value.clone().contiguous()
                if spoiled.is_floating_point() and spoiled.numel():
                    spoiled.view(-1)[draw.randrange(spoiled.numel())] = draw.choice((float("nan"), float("inf"), 1e38))
                state[name] = spoiled
            case 7:
                state[re.sub(r"\.0\.", draw.choice((".1.", ".99999999.", ".-1.", ".x.")), name, count=1)] = value
            case 8:
                state[name] = value.to_sparse() if draw.random() < 0.5 else value.to("meta")
            case _:
                state[name] = torch.empty(draw.choice(((0,), (0, 5), (3, 0), ())))
        if not state:
            break
    return state


def _official(task: str) -> Reader:
    def make(folder: Path) -> Case:
        model = _tiny(task)
        good = read_weights(save_official(task, model, folder / "good.pth"))
        whole = (folder / "good.pth").read_bytes()
        sizes = {
            name: getattr(model.config, name)
            for name in ("vision_heads", "text_heads", "decoder_heads", "vision_mlp", "text_mlp", "decoder_mlp")
            if hasattr(model.config, name)
        }
        path = folder / "model.pth"

        def case(draw: Draw) -> None:
            if draw.random() < 0.25:
                _put(draw, path, m.archive(draw, whole))
            else:
                _put(draw, path, saved(draw.choice(({"model": _bad_state(draw, good)}, _bad_state(draw, good)))))
            found = load_official(task, path, **sizes)
            if any(
                not torch.isfinite(value).all() for value in found.state_dict().values() if value.is_floating_point()
            ):
                raise Wrong("the model has numbers that are none")

        return case

    return make


for _task in ("caption", "classification", "nlvr", "retrieval", "retrieval-clip", "segmentation", "vqa"):
    READERS[f"published: {_task}"] = _official(_task)


@reader("checkpoints of a run")
def _checkpoints(folder: Path) -> Case:
    kept = Checkpoints(folder, 2)
    state = {
        "model": {"a": torch.randn(5, 3), "b": torch.zeros(4)},
        "place": {"steps": 3, "epoch": 0},
        "numbers": [1, 2.5, "text", None, True],
    }
    paths = [kept.write(step, {**state, "step": torch.tensor(step)}) for step in (1, 2)]
    good = [path.read_bytes() for path in paths]

    def case(draw: Draw) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for path, content in zip(paths, good, strict=True):
            path.write_bytes(content)
        bad = m.archive(draw, good[1])
        _put(draw, paths[1], bad)
        try:
            found = kept.newest()
        except UPopError as error:
            raise Wrong(f"the older one was not taken: {error}") from error
        if found is None or (found[0] == paths[0] and int(found[1]["step"]) != 1):
            raise Wrong(f"found {found}")
        if draw.random() < 0.2:  # all of them
            paths[0].write_bytes(m.archive(draw, good[0]))
            kept.newest()

    return case


# Plans and reports.


@reader("plans")
def _plans(folder: Path) -> Case:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    groups = upop.find_groups(model)
    plan = upop.Plan.of(groups, {group.name: range(0, group.size, 2) for group in groups}, ratio=0.5, cost="params")
    good = json.loads(plan.to_json())

    def case(draw: Draw) -> None:
        text = m.json_file(draw, good).decode("utf-8", draw.choice(("surrogateescape", "replace")))
        found = upop.Plan.from_json(text)
        found.check(model)
        found.to_json()

    return case


def _page_is_whole(html: str) -> None:
    page = pages.Page(html)
    scripts = page.named("script")
    if scripts:
        raise Wrong(f"the page has scripts: {scripts}")
    active = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    if active:
        raise Wrong(f"the page has {active[0]}")


_OF_RUNS = (
    "settings.yaml",
    "versions.json",
    "results.json",
    "metrics.jsonl",
    "examples/examples.json",
    "best/upop.json",
)


def _a_run(folder: Path) -> Path:
    """A finished run, as a real one writes it; it is made once."""
    made = folder.parent / "made"
    if (made / "run").exists():
        return Path(shutil.copytree(made / "run", folder / "run"))
    from upop.runs.verbs import compress

    config = runs.make_task("classification", made)
    task = find_task("classification")
    given = {"output_dir": made / "run", "num_workers": 0, "examples": 2}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        compress(task, read_settings(task.settings, config, given))
    return _a_run(folder)


def _restore(path: Path, content: bytes) -> None:
    _remove(path)
    path.write_bytes(content)


def _report(name: str) -> Reader:
    def make(folder: Path) -> Case:
        run = _a_run(folder)
        good = (run / name).read_bytes()
        other = Path(shutil.copytree(run, folder / "other"))

        def bad(draw: Draw) -> bytes:
            if name.endswith(".yaml"):
                import yaml

                return m.yaml_file(draw, yaml.safe_load(good))
            if name.endswith(".jsonl"):
                lines = good.splitlines()
                for _ in range(draw.choice((1, 3))):
                    number = draw.randrange(len(lines))
                    lines[number] = m.json_file(draw, json.loads(good.splitlines()[number % len(good.splitlines())]))
                return b"\n".join(lines) if draw.random() < 0.9 else m.damaged(draw, good)
            return m.json_file(draw, json.loads(good))

        def case(draw: Draw) -> None:
            _put(draw, run / name, bad(draw))
            found = read_run(run)
            if draw.random() < 0.3:
                page = comparison_page([found, read_run(other)]) if draw.random() < 0.5 else run_page(found)
                _page_is_whole(page)

        return case

    return make


for _file in _OF_RUNS:
    READERS[f"report: {_file}"] = _report(_file)


@reader("report: a command")
def _report_command(folder: Path) -> Case:
    run = _a_run(folder)
    good = {name: (run / name).read_bytes() for name in _OF_RUNS}

    def case(draw: Draw) -> str:
        for name, content in good.items():
            _restore(run / name, content)
        name = draw.choice(_OF_RUNS)
        content = good[name]
        _put(draw, run / name, m.damaged(draw, content) if draw.random() < 0.7 else m.whole_file(draw, content))
        words = [str(run), "--out", str(folder / "page.html")] + (["--compare"] if draw.random() < 0.3 else [])
        (folder / "page.html").unlink(missing_ok=True)
        return _called(["report", *words])

    return case


# Tokenizers.


@reader("tokenizers: BERT")
def _bert(folder: Path) -> Case:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "dog", "##s", "the", "red"]
    first = folder / "first"
    first.mkdir()
    (first / "vocab.txt").write_text("\n".join(words))
    load_tokenizer(first).save_pretrained(first)
    good = {path.name: path.read_bytes() for path in first.iterdir()}
    place = folder / "words"

    def case(draw: Draw) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        left = {name: content for name, content in good.items() if draw.random() < 0.8} or good
        for name, content in left.items():
            (place / name).write_bytes(content)
        name = draw.choice(sorted(left))
        if name.endswith(".json") and draw.random() < 0.8:
            content = m.json_file(draw, json.loads(good[name]))
        else:
            content = draw.choice((m.damaged, m.whole_file))(draw, good[name])
        _put(draw, place / name, content)
        tokenizer = load_tokenizer(place)
        tokenizer(["the red dogs", "a"], padding=True, return_tensors="pt")

    return case


@reader("tokenizers: CLIP")
def _clip_words(folder: Path) -> Case:
    import gzip

    pairs = ["a b", "ab c</w>", "d o", "do g</w>", "r e"]
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    names = [*letters, *(pair.replace(" ", "") for pair in pairs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = "#version: 0.2\n" + "\n".join(pairs) + "\n"
    place = folder / "words"

    def case(draw: Draw) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if draw.random() < 0.3:
            content = m.damaged(draw, merges.encode())
            packed = gzip.compress(content) if draw.random() < 0.5 else m.damaged(draw, gzip.compress(merges.encode()))
            _put(draw, place / "bpe.txt.gz", packed)
            tokenizer = load_clip_tokenizer(place / "bpe.txt.gz")
        else:
            bad = draw.random() < 0.5
            text = json.dumps(vocabulary).encode()
            (place / "vocab.json").write_bytes(m.json_file(draw, vocabulary) if bad else text)
            (place / "merges.txt").write_bytes(merges.encode() if bad else m.damaged(draw, merges.encode()))
            tokenizer = load_clip_tokenizer(place)
        tokenizer(["the red dogs", "a"], 8)

    return case
