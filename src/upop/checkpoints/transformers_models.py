"""transformers' own folders, dense or compressed, into models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from upop.checkpoints.fit import kept_sizes
from upop.checkpoints.likeness import cut_shapes
from upop.checkpoints.quantizer import METHOD, register
from upop.checkpoints.read import shared_tensors
from upop.checkpoints.sizes import dense_skeleton
from upop.errors import CheckpointError, UPopError
from upop.pruning import survey
from upop.reading import read_object

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def is_transformers_folder(path: Path) -> bool:
    """Whether `path` is a folder in transformers' layout: a config.json that names its kind of model."""
    if not (path / _CONFIG).is_file():
        return False
    try:
        return "model_type" in read_config(path)
    except CheckpointError:
        return True  # reading it tells what is wrong


def read_config(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says.

    Raises:
        CheckpointError: it cannot be read.
    """
    # Python writes numbers that JSON does not have, and so does transformers.
    return read_object(folder / _CONFIG, CheckpointError, "Fetch or write it again.", nan=True)


def misfit(model: PreTrainedModel) -> str | None:
    """Say why transformers could not load a model, dense or compressed, again; None if it can.

    What its configuration builds must have all of its tensors, but for what is cut, and tie the same of them.
    """
    try:
        dense = dense_skeleton(model)
        units = survey(dense).units
        mine = model.state_dict()
        shapes = cut_shapes(dense, units, kept_sizes(units, mine, type(model).__name__))
    except Exception as error:  # constructors raise what they like
        return str(error) or type(error).__name__
    for name, value in mine.items():
        if name not in shapes:
            return f"{name} is no part of it"
        if list(value.shape) != shapes[name]:
            return f"{name} has shape {tuple(value.shape)}, it makes {tuple(shapes[name])}"
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, first in shared_tensors(mine).items():
        if not {name, first} & {*tied, *tied.values()}:
            return f"{name} is {first} here, and in it they are two"
    return None


def load_transformers(folder: Path, kind: str | type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Return the model in a folder of transformers' layout, in evaluation mode, on the CPU, in the saved precision.

    Args:
        folder: with config.json and safetensors.
        kind: the class, or its full name; by default the one that config.json names.

    Raises:
        CheckpointError: a file is missing or damaged, transformers has no such class, or the weights do not fit it.
    """
    config = read_config(folder)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise CheckpointError(
            f"{folder} holds config.json and no {_WEIGHTS[0]}. Fetch or write the weights again, as safetensors."
        )
    record = config.get("quantization_config")
    if isinstance(record, dict) and record.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder} is quantized by {record.get('quant_method')!r}, whose weights upop does not read. "
            "Load it with transformers, or compress the model that it was quantized from."
        )
    if kind is None or isinstance(kind, str):
        names = [kind.rpartition(".")[2]] if kind else list(config.get("architectures") or ())
        found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            raise CheckpointError(
                f"{folder} holds a {kind or names or 'model without a name'}, which transformers "
                f"{transformers.__version__} does not have. Load it with its own class: YourModel.from_pretrained"
                f"({str(folder)!r}); after `import upop` that works for compressed models too."
            )
        kind = found
    register()
    try:
        model = kind.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    except UPopError:
        raise
    except (
        Exception
    ) as error:  # transformers raises whatever it meets: OSError, RuntimeError, ValueError, SafetensorError
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} cannot be loaded as {kind.__name__}: {reason} Was it saved by this class, and is it whole?"
        ) from error
    found_model: PreTrainedModel = model.eval()
    return found_model
