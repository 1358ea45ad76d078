"""docs/mistakes.md quotes messages: each is made here, by making the mistake.

Run as a script, this module writes the messages into the page: `PYTHONPATH=tests python tests/docs/test_mistakes.py`.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import runs
import upop
from documents import ROOT
from upop.data.tokenizer import load_tokenizer
from upop.runs.devices import make_accelerator
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.settings import read_settings
from upop.tasks import find_task

PAGE = ROOT / "docs" / "mistakes.md"
Mistake = Callable[[], Any]
MISTAKES: dict[str, Mistake] = {}
"""Heading -> what makes the mistake, in an empty folder; it raises, warns or returns what one sees."""


def mistake(heading: str) -> Callable[[Mistake], Mistake]:
    def note(make: Mistake) -> Mistake:
        MISTAKES[heading] = make
        return make

    return note


def tiny(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **(shape | sizes))


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def backward(model: nn.Module) -> None:
    model(IMAGES).sum().backward()


def searched(model: nn.Module, steps: int = 2) -> upop.Pruner:
    pruner = upop.Pruner(model, ratio=0.5, steps=steps, interval=1)
    for _ in range(steps):
        backward(model)
        pruner.step()
    return pruner


@mistake("Calling step() after zero_grad()")
def _() -> None:
    model = tiny()
    pruner = upop.Pruner(model, ratio=0.5, steps=10)
    backward(model)
    model.zero_grad()
    pruner.step()


@mistake("Giving Pruner fewer steps than the loop takes")
def _() -> None:
    model = tiny()
    pruner = searched(model, steps=10)
    backward(model)
    pruner.step()


@mistake("Giving Pruner more steps than the loop takes")
def _() -> None:
    model = tiny()
    pruner = upop.Pruner(model, ratio=0.5, steps=10)
    for _ in range(8):
        backward(model)
        pruner.step()
    pruner.shrink(verify=IMAGES)


@mistake("Freezing layers that should be pruned")
def _() -> None:
    model = tiny()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    upop.Pruner(model, ratio=0.5, steps=10)


@mistake("Pruning a model that is being pruned")
def _() -> None:
    model = tiny()
    first = upop.Pruner(model, ratio=0.5, steps=10)
    upop.Pruner(model, ratio=first.ratio, steps=10)


@mistake("Writing the ratio as a percentage")
def _() -> None:
    upop.Pruner(tiny(), ratio=50, steps=10)


@mistake("Asking for more than can be removed")
def _() -> None:
    upop.Pruner(tiny(), ratio=0.9, steps=10, round_to=64)


@mistake("Rounding the published ranking")
def _() -> None:
    upop.Pruner(tiny(), ratio=0.5, steps=10, cost="reference", round_to=8)


@mistake("Counting multiply-adds without an example")
def _() -> None:
    upop.Pruner(tiny(), ratio=0.5, steps=10, cost="macs")


@mistake("A pattern that matches nothing")
def _() -> None:
    upop.Pruner(tiny(), ratio=0.5, steps=10, exclude="blocks.0.attention")


@mistake("A model that draws random numbers of its own")
def _() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(images.shape, generator=draws)
            return self.vit(images + noise)

    draws = torch.Generator()
    searched(Noisy())


@mistake("Training in float16")
def _() -> None:
    model = tiny()
    pruner = upop.Pruner(model, ratio=0.5, steps=10, interval=5)
    for _ in range(6):
        (model(IMAGES).sum() * 1e38).backward()  # a loss scale that overflows
        pruner.step()


@mistake("Loading your own class by name")
def _() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.vit(images)

    Mine.__module__, Mine.__qualname__ = "my_models", "Mine"
    model = Mine()
    searched(model).shrink(verify=IMAGES)
    upop.save(model, "mine-2x")
    upop.load("mine-2x")


@mistake("Loading compressed weights into the dense model")
def _() -> str:
    model = tiny()
    searched(model).shrink(verify=IMAGES)
    try:
        tiny().load_state_dict(model.state_dict())
    except RuntimeError as error:
        return "RuntimeError: " + " ".join(str(error).splitlines()[:2])
    return ""


@mistake("A checkpoint that carries more than tensors")
def _() -> None:
    torch.save({"model": tiny().state_dict(), "args": Path("x")}, "model.pth")
    upop.load_official("deit", "model.pth")


def _task(name: str, **overrides: Any) -> tuple[Any, Any]:
    task = find_task(name)
    config = runs.make_task(name, Path(), **overrides)
    return task, read_settings(task.settings, config, {"output_dir": Path("run")})


@mistake("A wrong image_root")
def _() -> None:
    task, settings = _task("caption")
    compress(task, settings.model_copy(update={"image_root": Path("images")}))


@mistake("No tokenizer")
def _() -> None:
    load_tokenizer("pretrained/bert-base-uncased")


@mistake("A misspelt setting")
def _() -> None:
    Path("mine.yaml").write_text("image_root: images\nbatch_size: 32\ninit_ir: 1.0e-5\n")
    read_settings(find_task("nlvr").settings, Path("mine.yaml"), {})


@mistake("Evaluating on other classes")
def _() -> None:
    task, settings = _task("classification")
    for number in range(2):
        for split in ("train", "val"):
            folder = Path("photos") / split / f"class{number}"
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / "1.png")
    evaluate_checkpoint(task, settings.model_copy(update={"data_path": Path("photos")}))


@mistake("More labels than classes")
def _() -> None:
    task, settings = _task("segmentation")
    (settings.root / "objectInfo150.txt").unlink()  # which would say how many classes there are
    samples = task.dataset(settings.model_copy(update={"classes": 2}), "val")
    for number in range(len(samples)):
        samples[number]


@mistake("A learning rate that is too high")
def _() -> None:
    task, settings = _task("nlvr", init_lr=1e15, max_bad_steps=3)
    compress(task, settings)


@mistake("A queue that is smaller than the batches")
def _() -> None:
    task, settings = _task("retrieval", queue_size=8)
    task.dataset(settings, "train")


@mistake("Starting a run over an unfinished one")
def _() -> None:
    task, settings = _task("nlvr")
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/step-00000004.pt").touch()  # what a run leaves that was stopped
    compress(task, settings)


@mistake("Resuming in another folder")
def _() -> None:
    task, settings = _task("nlvr")
    compress(task, settings.model_copy(update={"resume": "must"}))


@mistake("An image that cannot be read")
def _() -> None:
    task, settings = _task("caption")
    samples = task.dataset(settings, "val")
    image = sorted(Path("data/images").rglob("*val*.png"))[0]
    image.write_bytes(image.read_bytes()[:100])
    for number in range(len(samples)):
        samples[number]


@mistake("Sharding weights in one process")
def _() -> None:
    make_accelerator(read_settings(find_task("nlvr").settings, None, {"device": "cpu", "sharding": "fsdp"}))


@mistake("More processes than GPUs")
def _() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "8")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        make_accelerator(read_settings(find_task("nlvr").settings, None, {}))


@mistake("Asking for a GPU that is not there")
def _() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        make_accelerator(read_settings(find_task("nlvr").settings, None, {"device": "cuda"}))


@mistake("The launcher takes --p for its own")
def _() -> str:
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit):
        get_args_parser().parse_args(["--nproc_per_node=8", "compress_nlvr.py", "--p", "0.5"])
    return said.getvalue().splitlines()[-1].partition("error: ")[2]


@mistake("Leaving out the distillation loss")
def _() -> None:
    model = tiny()
    compression = upop.Compression(model, ratio=0.5, steps=100)
    backward(model)
    compression.step(torch.optim.AdamW(model.parameters()))


def seen(make: Mistake) -> str:
    """Make a mistake, and return what one sees of it, as it were in a folder that is called `/home/you/work`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            described = make()
        except upop.errors.UPopError as error:
            return f"{type(error).__name__}: {error}".replace(str(Path.cwd()), "/home/you/work")
    if described is not None:
        return str(described)
    ours = [warning for warning in caught if issubclass(warning.category, UserWarning)]
    return f"UserWarning: {ours[-1].message}"


def sections() -> dict[str, str]:
    """Return heading -> text of the page."""
    parts = re.split(r"^## (?:\d+\. )?(.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


_QUOTE = re.compile(r"^```text\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def quoted(text: str) -> str | None:
    found = _QUOTE.search(text)
    return " ".join(found[1].split()) if found else None


def write() -> None:
    """Write the messages, as they are now, into the page."""
    page = PAGE.read_text()
    for heading, text in sections().items():
        if heading not in MISTAKES:
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            message = " ".join(seen(MISTAKES[heading]).split())
        if _rounded(message) == _rounded(str(quoted(text))):
            continue
        lines = textwrap.wrap(message, 118, break_long_words=False, break_on_hyphens=False)
        block = "\n".join(["```text", *lines, "```"])
        page = page.replace(text, _QUOTE.sub(lambda _, block=block: block, text, count=1))
    PAGE.write_text(page)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def test_every_message_is_made_here() -> None:
    assert {heading for heading, text in sections().items() if quoted(text)} == set(MISTAKES)
    assert len(sections()) >= 15


@pytest.mark.parametrize("heading", MISTAKES)
def test_the_message_is_the_one_that_is_quoted(heading: str, empty: None) -> None:
    assert _rounded(seen(MISTAKES[heading])) == _rounded(str(quoted(sections()[heading])))


def _rounded(message: str) -> str:
    """Return a message on one line, without how large a difference or a step was."""
    return re.sub(r"\d\.\d+e[-+]\d+", "N", " ".join(message.split()))


if __name__ == "__main__":
    write()
