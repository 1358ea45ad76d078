"""`upop export`: a model for other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from upop.checkpoints import Checkpoint, open_checkpoint
from upop.checkpoints.loading import is_timm_name, load_named
from upop.cli import options as o
from upop.errors import CheckpointError, SettingError
from upop.files import check_folder
from upop.ownership import Kind
from upop.plain import as_text
from upop.reading import read_object

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Asked:
    """What a command line asks of a target, beside the model."""

    out: Path
    overwrite: bool = False
    source: Path | None = None
    cache: bool = False
    quantize: Any = None
    samples: Sequence[Any] | None = None


@dataclass(frozen=True)
class Target:
    """Something that a model can be written as.

    Attributes:
        summary: what the help says of it.
        write: writes a model.
        check: refuses, before a model is read, what the target does not take: its source, --cache or --quantize.
        kind: of the folder, as `upop.files` knows it.
        own: whether a model of transformers that stands for one of upop's own is read as that.
    """

    summary: str
    write: Callable[[nn.Module, Asked], None]
    check: Callable[[str, bool, str | None], None]
    kind: Kind = "graphs"
    own: bool = True


def _graphs(format: Any) -> Callable[[nn.Module, Asked], None]:
    def write(model: nn.Module, asked: Asked) -> None:
        from upop.checkpoints.export import export as export_model

        export_model(
            model,
            asked.out,
            format,
            cache=asked.cache,
            quantize=asked.quantize,
            samples=asked.samples,
            overwrite=asked.overwrite,
        )
        _notify(asked.out)

    return write


def _without_upop(format: Any) -> Callable[[nn.Module, Asked], None]:
    def write(model: nn.Module, asked: Asked) -> None:
        from upop.checkpoints.export.plain_models import write_plain

        described = write_plain(model, asked.out, format, beside=asked.source, overwrite=asked.overwrite)
        Console(soft_wrap=True, highlight=False).print(as_text(f"{asked.out}: {described}"))

    return write


def _graphs_take(format: str) -> Callable[[str, bool, str | None], None]:
    def check(source: str, cache: bool, quantize: str | None) -> None:
        del source, cache
        from upop.checkpoints.export.graph_files import check_quantize

        check_quantize(quantize, format)

    return check


def _models_take(format: str) -> Callable[[str, bool, str | None], None]:
    def check(source: str, cache: bool, quantize: str | None) -> None:
        if quantize is not None or cache:
            flag = "--cache is for graphs" if quantize is None else "--quantize is for --to onnx and --to openvino"
            raise SettingError(f"{flag}; --to {format} writes a model. Leave it out.")
        if format == "nemotron-nas" and not is_timm_name(source):
            _has_layers_of_llama(open_checkpoint(source))

    return check


def _has_layers_of_llama(checkpoint: Checkpoint) -> None:
    if checkpoint.library != "transformers":
        return
    from upop.checkpoints.export.nemotron_nas import refuse_others
    from upop.checkpoints.formats.transformers import class_named

    refuse_others(checkpoint.meta_state(), class_named(checkpoint.path))


TARGETS: Mapping[str, Target] = {
    "onnx": Target("ONNX files, for onnxruntime and others", _graphs("onnx"), _graphs_take("onnx")),
    "openvino": Target("OpenVINO's files", _graphs("openvino"), _graphs_take("openvino")),
    "torch-export": Target("programs of torch.export", _graphs("torch-export"), _graphs_take("torch-export")),
    "padded": Target(
        "an ordinary model, with zeros up to the widest layer",
        _without_upop("padded"),
        _models_take("padded"),
        "model",
        False,
    ),
    "nemotron-nas": Target(
        "a decoder for vLLM, llama.cpp, MLX, layer by layer",
        _without_upop("nemotron-nas"),
        _models_take("nemotron-nas"),
        "model",
        False,
    ),
}
"""What `--to` takes. A new target is a line here, and a function that writes a model."""


def _target(name: str) -> str:
    if name not in TARGETS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, TARGETS))}")
    return name


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a published .pth or .safetensors, a name of timm, or a name on the hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; an older one of the same kind is replaced.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            "--format",
            parser=_target,
            metavar="<target>",
            help=f"What to write: {'; '.join(f'{name}: {each.summary}' for name, each in TARGETS.items())}.",
            autocompletion=o.starting_with(lambda: TARGETS),
        ),
    ] = "onnx",
    cache: Annotated[
        bool, typer.Option("--cache", help="Of a decoder that generates: keys and values go in and come out.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="int8", help="Whole numbers in linear layers (onnx, openvino)."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="With --quantize and --config: measure ranges on so many training samples, not as inputs come."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the task's settings, for --samples.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Whose model a published file holds, told by its tensors if not given; and of which --samples are."
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Write a model, dense or compressed, for another runtime, checked to compute the same there.

    Models of upop's tasks become the graphs that their task calls; any other one a graph of one call of it.
    """
    target = TARGETS[to]
    if samples is not None and (quantize is None or config is None):
        raise SettingError("--samples are a task's, for --quantize int8. Give --quantize and --config, too.")
    target.check(source, cache, quantize)
    check_folder(out, target.kind, overwrite=overwrite)
    model = load_named(source, task, own=target.own, **o.overrides({}, assign))
    chosen = None if samples is None or config is None else _samples(model, task, config, samples)
    place = None if is_timm_name(source) else open_checkpoint(source).path
    target.write(model, Asked(out, overwrite, place, cache, quantize, chosen))


def _samples(model: nn.Module, name: str | None, config: Path, count: int) -> list[Mapping[str, Any]]:
    """Return the inputs of a task's first training samples, one by one."""
    from upop.checkpoints.published.tasks import task_for
    from upop.settings import read_settings
    from upop.tasks import find_task

    task = find_task(name or task_for(model))
    settings = read_settings(task.settings, config, {})
    held: Any = task.dataset(settings, "train")
    collate = task.collate(settings)
    return [task.inputs(collate([held[place]])) for place in range(min(count, len(held)))]


def _notify(out: Path) -> None:
    """Print which graphs were written."""
    console = Console(soft_wrap=True, highlight=False)
    for name, graph in read_object(out / "export.json", CheckpointError, "Export the model again.")["graphs"].items():
        axes = ", ".join(f"{key} {tuple(value)}".replace("'", "") for key, value in graph["inputs"].items())
        said = f"largest difference {graph['largest_difference']:.1e}"
        small = graph.get("quantized")
        if small is not None:
            before, after = (size / 1e6 for size in small["bytes"])
            said += f"; {small['to']}: {before:.1f} -> {after:.1f} MB, difference {small['difference']:.1e}"
        console.print(as_text(f"{out / graph['file']}: {name}({axes}) -> {', '.join(graph['outputs'])}; {said}"))
