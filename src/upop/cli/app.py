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
from rich.console import Console

from upop import __version__
from upop.cli import options as o
from upop.cli.check import check
from upop.cli.convert import convert
from upop.cli.demo import demo
from upop.cli.export import export
from upop.cli.help import Command, Group, InterruptedCommandError
from upop.cli.inspect import inspect
from upop.cli.misuse import say_misused
from upop.cli.processes import place, recorded, wait_for_launcher
from upop.cli.recipes import recipes, run
from upop.cli.report import report
from upop.errors import LostProcessError, PreemptedError, SettingError, UPopError
from upop.plain import as_text, plain
from upop.starting import INTERRUPTED, end_watch
from upop.tasks import TASKS, find_task
from upop.tasks.verbs import compress as run_compress
from upop.tasks.verbs import evaluate_checkpoint
from upop.tasks.verbs import train as run_train

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make vision-language transformers two to ten times smaller by unified and progressive pruning.",
    epilog="Example: upop compress nlvr --config configs/nlvr.yaml --ratio 0.5 --output-dir output/nlvr-2x",
)
data = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Make data sets.")
app.add_typer(data, name="data")
app.command(cls=Command, epilog="Example: upop check coco-caption-2x")(check)
app.command(cls=Command, epilog="Example: upop demo --output-dir output/demo")(demo)
app.command(cls=Command, epilog="Example: upop convert model_base_caption.pth blip-caption --to hugging-face")(convert)
app.command(cls=Command, epilog="Example: upop export output/caption-2x/best --out output/caption-2x/onnx")(export)
app.command(cls=Command, epilog="Example: upop inspect deit_small_patch16_224 --ratio 0.5")(inspect)
app.command(cls=Command, epilog="Example: upop recipes")(recipes)
app.command(cls=Command, epilog="Example: upop report output/caption-2x")(report)
app.command(cls=Command, epilog="Example: upop run nlvr2-2x --dry-run")(run)

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help=f"What to learn: {', '.join(TASKS)}.", autocompletion=o.starting_with(lambda: TASKS)
    ),
]


class ShapesTask(StrEnum):
    """The tasks that generated data exists for."""

    nlvr = "nlvr"
    caption = "caption"
    vqa = "vqa"
    retrieval = "retrieval"
    retrieval_flickr = "retrieval-flickr"
    classification = "classification"
    segmentation = "segmentation"


class PictureFormat(StrEnum):
    """How generated pictures are written."""

    png = "png"
    jpeg = "jpeg"


def _version(asked: bool) -> None:
    if asked:
        print(f"upop {__version__}")
        raise typer.Exit


@app.command(cls=Command, epilog="Example: upop train nlvr --config configs/shapes/nlvr.yaml --output-dir output/dense")
def train(
    context: typer.Context,
    task: TaskName,
    config: o.Config = None,
    pretrained: o.Pretrained = None,
    architecture: o.Architecture = None,
    data_path: o.DataPath = None,
    output_dir: o.OutputDir = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of training.")] = None,
    epoch: o.OldEpoch = None,
    device: o.DeviceName = None,
    fsdp: o.Fsdp = None,
    seed: o.Seed = None,
    amp: o.Amp = None,
    batch_size_train: o.BatchSize = None,
    grad_checkpointing: o.GradCheckpointing = None,
    trackers: o.Tracker = None,
    resume: o.Resume = None,
    allow_changes: o.AllowChanges = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    assign: o.Set = None,
) -> None:
    """Train or fine-tune a dense model."""
    found = find_task(task)
    run_train(found, o.read(context, found.settings, config, assign, also=o.sharding(fsdp)))


@app.command(
    cls=Command,
    epilog="Example: upop compress nlvr --config configs/nlvr.yaml --ratio 0.75 --epochs 46 --output-dir output/4x",
)
def compress(
    context: typer.Context,
    task: TaskName,
    config: o.Config = None,
    ratio: o.Ratio = None,
    p: o.OldRatio = None,
    epochs: o.Epochs = None,
    epoch: o.OldEpoch = None,
    pretrained: o.Pretrained = None,
    architecture: o.Architecture = None,
    data_path: o.DataPath = None,
    output_dir: o.OutputDir = None,
    device: o.DeviceName = None,
    fsdp: o.Fsdp = None,
    seed: o.Seed = None,
    amp: o.Amp = None,
    batch_size_train: o.BatchSize = None,
    grad_checkpointing: o.GradCheckpointing = None,
    trackers: o.Tracker = None,
    cost: Annotated[str | None, typer.Option(help="What the budget counts: params, flops or reference.")] = None,
    align: o.Align = None,
    interval: o.Interval = None,
    method: o.Method = None,
    w_sp_attn: o.SparsityAttention = None,
    w_sp_mlp: o.SparsityMlp = None,
    resume: o.Resume = None,
    allow_changes: o.AllowChanges = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    assign: o.Set = None,
) -> None:
    """Search, shrink, retrain and evaluate."""
    found = find_task(task)
    settings = o.read(context, found.settings, config, assign, also=o.sharding(fsdp))
    if interval is not None and settings.method != "reference":
        raise SettingError(
            f"--interval {interval} says how often the published search moves its masks, and the method is "
            f"{settings.method}, which has no use for it. Leave it out, or add --method reference."
        )
    if epoch is not None:
        _note(
            f"--epoch {epoch}, as in the published commands, is {epoch} epochs of search and {epoch} of retraining; "
            f"--epochs {2 * epoch} says the same."
        )
    run_compress(found, settings)


@app.command(
    cls=Command, epilog="Example: upop evaluate nlvr --config configs/nlvr.yaml --pretrained output/nlvr-2x/best"
)
def evaluate(
    context: typer.Context,
    task: TaskName,
    config: o.Config = None,
    pretrained: o.Pretrained = None,
    architecture: o.Architecture = None,
    data_path: o.DataPath = None,
    output_dir: o.OutputDir = None,
    device: o.DeviceName = None,
    amp: o.Amp = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    assign: o.Set = None,
) -> None:
    """Evaluate a checkpoint, dense or compressed."""
    found = find_task(task)
    evaluate_checkpoint(found, o.read(context, found.settings, config, assign))


@data.command(
    cls=Command, epilog="Example: upop data shapes --task nlvr --out output/shapes/nlvr --seed 0 --size 20000"
)
def shapes(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new, empty, or hold the same set.")],
    task: Annotated[ShapesTask, typer.Option(help="Which task's files to write.")] = ShapesTask.nlvr,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    size: Annotated[int, typer.Option(help="Training records; other splits have a tenth, at most 1000.")] = 20000,
    image_size: Annotated[int, typer.Option("--image-size", "--image_size", help="Side in pixels.")] = 64,
    image_format: Annotated[
        PictureFormat, typer.Option("--image-format", "--image_format", help="File format.")
    ] = PictureFormat.png,
) -> None:
    """Generate pictures of coloured shapes with annotations in the published formats."""
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
    """Run a command; an error of ours ends it with a message and exit code 1, without a traceback.

    A command line that cannot be understood exits with 2; a run that was asked to end and can be resumed, with 75; a
    command that Ctrl-C ended, with 130.
    """
    end_watch()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal's encoding lacks is written out
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = o.with_resume_value(sys.argv[1:])
    format_as_before, warnings.formatwarning = warnings.formatwarning, _warning
    called = Path(sys.argv[0]).name
    name = "python -m upop" if called == "__main__.py" else called
    try:
        code = recorded(lambda: command(prog_name=name, standalone_mode=False))
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        sys.exit(say_misused(error))
    except (InterruptedCommandError, KeyboardInterrupt) as error:
        print(plain(str(error) or "Interrupted (Ctrl-C)."), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UPopError as error:
        _say(type(error).__name__, _message(error))
        if isinstance(error, LostProcessError):
            wait_for_launcher()
        sys.exit(PreemptedError.exit_code if isinstance(error, PreemptedError) else 1)
    except OSError as error:  # a disk that is full or gone, a name that no file can have, a place without permission
        if isinstance(error, BrokenPipeError):  # what the output was piped to has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tells of it as it exits
            sys.exit(1)
        _say(type(error).__name__, f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        sys.exit(1)
    finally:
        warnings.formatwarning = format_as_before


def _note(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(as_text(f"Note: {message}"))


def _say(kind: str, message: str) -> None:
    Console(stderr=True).print(f"[bold red]Error{place()}:[/bold red] {kind}:", end=" ")
    Console(stderr=True, soft_wrap=True).print(as_text(message))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as a person needs it: without the line of code that gave it."""
    del filename, lineno, line
    return f"{category.__name__}: {plain(message)}\n"


def _message(error: UPopError) -> str:
    # A worker process sends its error with a traceback around it; a person needs the error alone.
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith("Caught ") else text.strip()
