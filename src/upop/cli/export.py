"""`upop export`: writes a model for other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from upop.cli import options as o
from upop.plain import as_text
from upop.starting import starting

if TYPE_CHECKING:
    from torch import nn

    from upop.checkpoints import Checkpoint
    from upop.ownership import Kind


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export, besides the model."""

    out: Path
    overwrite: bool = False
    source: Path | None = None
    cache: bool = False
    quantize: Any = None
    samples: Sequence[Any] | None = None


@dataclass(frozen=True)
class Target:
    """A format that models are exported to.

    Attributes:
        summary: its description in the help.
        write: writes a model.
        check: raises an error for a source, --cache or --quantize that the target does not support, before the model
            is read.
        kind: of the folder, for `upop.files`.
        own: whether to read a BLIP or CLIP model of transformers as upop's own class.
    """

    summary: str
    write: Callable[[nn.Module, ExportOptions], None]
    check: Callable[[str, bool, str | None], None]
    kind: Kind = "graphs"
    own: bool = True


def _graphs(format: Any) -> Callable[[nn.Module, ExportOptions], None]:
    def write(model: nn.Module, options: ExportOptions) -> None:
        from upop.checkpoints.export import export as export_model

        export_model(
            model,
            options.out,
            format,
            cache=options.cache,
            quantize=options.quantize,
            samples=options.samples,
            overwrite=options.overwrite,
        )
        _notify(options.out)

    return write


def _without_upop(format: Any) -> Callable[[nn.Module, ExportOptions], None]:
    def write(model: nn.Module, options: ExportOptions) -> None:
        from upop.checkpoints.export.plain_models import write_plain

        note = write_plain(model, options.out, format, beside=options.source, overwrite=options.overwrite)
        Console(soft_wrap=True, highlight=False).print(as_text(f"{options.out}: {note}"))

    return write


def _check_graphs(format: str) -> Callable[[str, bool, str | None], None]:
    def check(source: str, cache: bool, quantize: str | None) -> None:
        del source, cache
        from upop.checkpoints.export.graph_files import check_quantize

        check_quantize(quantize, format)

    return check


def _check_models(format: str) -> Callable[[str, bool, str | None], None]:
    def check(source: str, cache: bool, quantize: str | None) -> None:
        from upop.checkpoints import open_checkpoint
        from upop.checkpoints.loading import is_timm_name
        from upop.errors import SettingError

        if quantize is not None or cache:
            flag = "--cache is for graphs" if quantize is None else "--quantize is for --to onnx and --to openvino"
            raise SettingError(f"{flag}; --to {format} writes a model. Leave it out.")
        if format == "nemotron-nas" and not is_timm_name(source):
            _check_llama_layers(open_checkpoint(source))

    return check


def _check_llama_layers(checkpoint: Checkpoint) -> None:
    if checkpoint.library != "transformers":
        return
    from upop.checkpoints.export.nemotron_nas import refuse_others
    from upop.checkpoints.formats.transformers import class_named

    refuse_others(checkpoint.meta_state(), class_named(checkpoint.path))


TARGETS: Mapping[str, Target] = {
    "onnx": Target("ONNX files, for onnxruntime and others", _graphs("onnx"), _check_graphs("onnx")),
    "openvino": Target("OpenVINO's files", _graphs("openvino"), _check_graphs("openvino")),
    "torch-export": Target("programs of torch.export", _graphs("torch-export"), _check_graphs("torch-export")),
    "padded": Target(
        "an ordinary model, with zeros up to the widest layer",
        _without_upop("padded"),
        _check_models("padded"),
        "model",
        False,
    ),
    "nemotron-nas": Target(
        "a decoder for vLLM, llama.cpp, MLX, layer by layer",
        _without_upop("nemotron-nas"),
        _check_models("nemotron-nas"),
        "model",
        False,
    ),
}
"""The values of `--to`. A new target is a line here and a function that writes a model."""


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
            help=f"Format to write: {'; '.join(f'{name}: {each.summary}' for name, each in TARGETS.items())}.",
            autocompletion=o.starting_with(lambda: TARGETS),
        ),
    ] = "onnx",
    cache: Annotated[
        bool, typer.Option("--cache", help="Make keys and values inputs and outputs of a generative decoder.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="int8", help="Quantize weights and inputs of linear layers (onnx, openvino)."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="With --quantize and --config: calibrate ranges on this many training samples of the task, instead of "
            "dynamic quantization."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the task's settings, for --samples.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task of a published checkpoint file, and of --samples. [default: derived from the tensors]"),
    ] = None,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Export a model, dense or compressed, to another runtime, and verify its outputs there.

    Models of upop's tasks become the graphs that their task calls; other models become one graph of a forward pass.
    """
    with starting():
        from upop.checkpoints import open_checkpoint
        from upop.checkpoints.loading import is_timm_name, load_named
        from upop.errors import SettingError
        from upop.files import check_folder

    target = TARGETS[to]
    if samples is not None and (quantize is None or config is None):
        raise SettingError("--samples needs --quantize int8, and the settings of a task in --config. Give both.")
    target.check(source, cache, quantize)
    check_folder(out, target.kind, overwrite=overwrite)
    model = load_named(source, task, own=target.own, **o.overrides({}, assign))
    chosen = None if samples is None or config is None else _samples(model, task, config, samples)
    place = None if is_timm_name(source) else open_checkpoint(source).path
    target.write(model, ExportOptions(out, overwrite, place, cache, quantize, chosen))


def _samples(model: nn.Module, name: str | None, config: Path, count: int) -> list[Mapping[str, Any]]:
    """Return the inputs of a task's first training samples, one mapping per sample."""
    from upop.checkpoints.published.tasks import task_for
    from upop.settings import read_settings
    from upop.tasks import find_task

    task = find_task(name or task_for(model))
    settings = read_settings(task.settings, config, {})
    held: Any = task.dataset(settings, "train")
    collate = task.collate(settings)
    return [task.inputs(collate([held[place]])) for place in range(min(count, len(held)))]


def _notify(out: Path) -> None:
    """Print the graphs that were written."""
    from upop.errors import CheckpointError
    from upop.reading import read_object

    console = Console(soft_wrap=True, highlight=False)
    for name, graph in read_object(out / "export.json", CheckpointError, "Export the model again.")["graphs"].items():
        axes = ", ".join(f"{key} {tuple(value)}".replace("'", "") for key, value in graph["inputs"].items())
        note = f"largest difference {graph['largest_difference']:.1e}"
        small = graph.get("quantized")
        if small is not None:
            before, after = (size / 1e6 for size in small["bytes"])
            note += f"; {small['to']}: {before:.1f} -> {after:.1f} MB, difference {small['difference']:.1e}"
        console.print(as_text(f"{out / graph['file']}: {name}({axes}) -> {', '.join(graph['outputs'])}; {note}"))
