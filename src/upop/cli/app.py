"""The command `upop`."""

from __future__ import annotations

import io
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from upop import __version__
from upop.cli.arguments import with_resume_value
from upop.cli.help import Command, Group, InterruptedCommandError
from upop.cli.later import Later, LaterGroup
from upop.cli.misuse import print_misuse
from upop.cli.processes import place, recorded, wait_for_launcher
from upop.plain import as_text, plain
from upop.starting import INTERRUPTED, end_watch


class _Commands(LaterGroup):
    """The commands of upop: one line each, and a module that is imported on call."""

    later = {  # noqa: RUF012 - never changed
        "check": Later(
            "upop.cli.check",
            "Check the data, the checkpoint and the tokenizer of a published run; exit code 1 if something is wrong",
            "upop check coco-caption-2x",
        ),
        "demo": Later(
            "upop.cli.demo",
            "Compress a small visual reasoning model, and compare it with the dense one",
            "upop demo --output-dir output/demo",
        ),
        "convert": Later(
            "upop.cli.convert",
            "Convert a BLIP, CLIP, DeiT or Segmenter model, dense or compressed, to another format",
            "upop convert model_base_caption.pth blip-caption --to hugging-face",
        ),
        "export": Later(
            "upop.cli.export",
            "Export a model, dense or compressed, to another runtime, and verify its outputs there",
            "upop export output/caption-2x/best --out output/caption-2x/onnx",
        ),
        "inspect": Later(
            "upop.cli.inspect",
            "Show a model's groups, parameters and GMACs per modality, its coverage, and preview a budget",
            "upop inspect deit_small_patch16_224 --ratio 0.5",
        ),
        "profile": Later(
            "upop.cli.profile",
            "Measure the latency of a model's layers on this machine, for --target latency=0.5 or latency=12ms",
            "upop profile deit_small_patch16_224 --batch 16 --out profile.json",
        ),
        "prune": Later(
            "upop.cli.prune",
            "Prune a model of transformers or open_clip without training, and evaluate it before and after",
            "upop prune HuggingFaceTB/SmolVLM-256M-Instruct --data chats.jsonl --ratio 0.25",
        ),
        "recipes": Later("upop.cli.recipes", "List every published run", "upop recipes"),
        "report": Later(
            "upop.cli.report",
            "Write an HTML report of a run: results, kept channels, curves, examples, settings",
            "upop report output/caption-2x",
        ),
        "run": Later(
            "upop.cli.recipes",
            "Start a published run, with the published search; `--method upop` is better",
            "upop run nlvr2-2x --dry-run",
        ),
        "train": Later(
            "upop.cli.tasks",
            "Train or fine-tune a dense model",
            "upop train nlvr --config configs/shapes/nlvr.yaml --output-dir output/dense",
        ),
        "compress": Later(
            "upop.cli.tasks",
            "Compress a dense model: search, cut, retrain and evaluate",
            "upop compress nlvr --config configs/nlvr.yaml --ratio 0.75 --epochs 46 --output-dir output/4x",
        ),
        "evaluate": Later(
            "upop.cli.tasks",
            "Evaluate a checkpoint, dense or compressed",
            "upop evaluate nlvr --config configs/nlvr.yaml --pretrained output/nlvr-2x/best",
        ),
    }


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make vision-language transformers two to ten times smaller by unified and progressive pruning.",
    epilog="Example: upop compress nlvr --config configs/nlvr.yaml --ratio 0.5 --output-dir output/nlvr-2x",
)
data = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Make data sets.")
app.add_typer(data, name="data")


class ShapesTask(StrEnum):
    """Tasks with generated data."""

    nlvr = "nlvr"
    caption = "caption"
    vqa = "vqa"
    retrieval = "retrieval"
    retrieval_flickr = "retrieval-flickr"
    classification = "classification"
    segmentation = "segmentation"
    chat = "chat"


class ImageFormat(StrEnum):
    """File format of generated images."""

    png = "png"
    jpeg = "jpeg"


def _version(asked: bool) -> None:
    if asked:
        print(f"upop {__version__}")
        raise typer.Exit


@data.command(
    cls=Command, epilog="Example: upop data shapes --task nlvr --out output/shapes/nlvr --seed 0 --size 20000"
)
def shapes(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new, empty, or hold the same set.")],
    task: Annotated[
        ShapesTask, typer.Option(metavar="TASK", help=f"Task of the data: {', '.join(ShapesTask)}.")
    ] = ShapesTask.nlvr,
    seed: Annotated[int, typer.Option(help="The same seed writes the same bytes.")] = 0,
    size: Annotated[int, typer.Option(help="Training samples; other splits have a tenth, at most 1000.")] = 20000,
    image_size: Annotated[int, typer.Option("--image-size", "--image_size", help="Side in pixels.")] = 64,
    image_format: Annotated[
        ImageFormat, typer.Option("--image-format", "--image_format", help="File format.")
    ] = ImageFormat.png,
) -> None:
    """Generate images of coloured shapes with annotations in the published formats."""
    from upop.cli.shapes import write_with_progress

    write_with_progress(task.value, out, seed=seed, size=size, image_size=image_size, image_format=image_format.value)


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(command: typer.Typer = app) -> None:
    """Run a command; a `UPopError` ends it with a message and exit code 1, without a traceback.

    An invalid command line exits with 2, a run that was stopped and can be resumed with 75, and Ctrl-C with 130.
    """
    end_watch()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = with_resume_value(sys.argv[1:])
    format_as_before, warnings.formatwarning = warnings.formatwarning, _warning
    called = Path(sys.argv[0]).name
    name = "python -m upop" if called == "__main__.py" else called
    try:
        code = recorded(lambda: command(prog_name=name, standalone_mode=False))
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        sys.exit(print_misuse(error))
    except (InterruptedCommandError, KeyboardInterrupt) as error:
        print(plain(str(error) or "Interrupted (Ctrl-C)."), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.exit(_failed(error))
    finally:
        warnings.formatwarning = format_as_before


def _failed(error: Exception) -> int:
    """Print an error that the user can resolve, and return the exit code; re-raise any other."""
    from upop.errors import LostProcessError, PreemptedError, UPopError
    from upop.libraries import missing

    if isinstance(error, ModuleNotFoundError):
        error = missing(error, "This command")
    if isinstance(error, UPopError):
        _notify(type(error).__name__, _message(error))
        if isinstance(error, LostProcessError):
            wait_for_launcher()
        return PreemptedError.exit_code if isinstance(error, PreemptedError) else 1
    if not isinstance(error, OSError):
        raise error
    # A full or missing disk, an invalid file name, or missing permissions.
    if isinstance(error, BrokenPipeError):  # the reader of the pipe has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python prints an error at exit
        return 1
    _notify(type(error).__name__, f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    return 1


def _notify(kind: str, message: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"[bold red]Error{place()}:[/bold red] {kind}:", end=" ")
    Console(stderr=True, soft_wrap=True).print(as_text(message))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning without its line of code."""
    del filename, lineno, line
    return f"{category.__name__}: {plain(message)}\n"


def _message(error: Exception) -> str:
    # An error from a worker process contains its traceback; only the message is printed.
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith("Caught ") else text.strip()
