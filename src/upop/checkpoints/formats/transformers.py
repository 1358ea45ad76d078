"""Folders of transformers, dense or compressed, loaded as transformers' own classes."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from upop.checkpoints.files.config_json import FILE as _CONFIG
from upop.checkpoints.files.config_json import read_config
from upop.checkpoints.files.weights import own_file, read_meta, safe_weights
from upop.checkpoints.fitting.fit import AT_MOST, BESIDE, listed, not_finite
from upop.checkpoints.fitting.meta import meta_model
from upop.checkpoints.formats.format import Own
from upop.checkpoints.libraries import image_settings
from upop.checkpoints.libraries.outside import Held, checked_config, sealed
from upop.checkpoints.saving.quantizer import UpopConfig, allowing_gaps, cut_as_recorded, register
from upop.errors import CheckpointError, UPopError
from upop.reading import read_object
from upop.values import shortened

if TYPE_CHECKING:
    from upop.checkpoints.opening import Checkpoint

_ADAPTER = "adapter_config.json"
_PARTS_OF_PROCESSES = "shard-*-model-*.safetensors"  # transformers takes them before any other file
_FILE_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def config(path: Path) -> Mapping[str, Any]:
    """Return the content of config.json."""
    return read_config(path)


def load(checkpoint: Checkpoint, *, strict: bool) -> PreTrainedModel:
    """Return the model; see `load_transformers`."""
    return load_transformers(checkpoint.path, strict=strict)


def own(checkpoint: Checkpoint) -> Own:
    """Return the model as its counterpart among upop's own models.

    Raises:
        CheckpointError: it has none, a file is damaged, the counterpart computes something else, or residual streams
            are narrower than the configuration says.
    """
    path = checkpoint.path
    narrower = narrower_streams(path)
    if narrower:
        raise CheckpointError(
            f"{path} was cut with width=True: {', '.join(narrower)} keep fewer channels than the configuration says, "
            "which upop's own models do not support. Load it as a transformers model (upop.load)."
        )
    images = image_settings.from_transformers(path)
    from upop.checkpoints.names.counterparts import check_counterpart, counterpart_named  # of timm, partly

    row = counterpart_named(class_named(path))
    found = config_of(path, getattr(transformers, row.kind))
    try:
        check_counterpart(row, found)
        sizes = row.sizes(found)
    except CheckpointError:
        raise
    except Exception as error:  # configurations raise errors of many kinds
        raise CheckpointError(f"{path / _CONFIG} cannot be read: {error}. Fetch it again.") from error

    def read(strict: bool) -> Mapping[str, Tensor]:
        return row.read(load_transformers(path, strict=strict).float().state_dict())

    return Own(read, row.task, row.kind, sizes, images)


def narrower_streams(path: Path) -> list[str]:
    """Return the residual streams that were pruned, as config.json records them."""
    record = read_config(path).get("quantization_config")
    groups = record.get("groups") if isinstance(record, Mapping) else None
    found = groups if isinstance(groups, Mapping) else {}
    return [name for name, each in found.items() if isinstance(each, Mapping) and each.get("kind") == "residual"]


def class_named(path: Path) -> str:
    """Return the name of the class in a folder's config.json, for messages."""
    return (architectures(path, read_config(path)) or ["model without a name"])[0]


def load_transformers(
    folder: Path, kind: str | type[PreTrainedModel] | None = None, *, strict: bool = True
) -> PreTrainedModel:
    """Load a folder of transformers, in evaluation mode, on the CPU, in the saved precision.

    Only transformers' own classes are built: code that the folder names does not run, and nothing is downloaded.

    Args:
        folder: a folder with config.json and safetensors.
        kind: the class, or its full name; by default that in config.json.
        strict: False warns of weights that are missing, unexpected, of another shape or not finite, and of another
            class.

    Raises:
        CheckpointError: a file is missing or damaged, transformers has no such class, or the weights do not fit;
            misfits are listed.
    """
    described, held = _read(folder)
    found = _class_of(folder, described, kind, strict=strict)
    with sealed(), _explained(folder, found):
        config = _config_class(found, described).from_dict(described)
        _check_sizes(found, config, held, folder)
        model, info = _from_pretrained(found, folder, config)
    _check_loaded(model, info, held, folder, strict=strict)
    model.eval()
    return model


def started(folder: Path, name: str, changes: Mapping[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """Load a folder as the start of a training, and return the model and the names of newly initialised tensors.

    Args:
        folder: a folder with config.json and safetensors.
        name: the name of a class of transformers.
        changes: fields of config.json to override.

    Raises:
        CheckpointError: a file is missing or damaged, or no tensor belongs to such a model.
    """
    described, held = _read(folder)
    kind = getattr(transformers, name)
    with sealed(), _explained(folder, kind):
        config = _config_class(kind, described).from_dict({**described, **changes})
        model, info = _from_pretrained(kind, folder, config)
    fresh = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if len(fresh) == len(model.state_dict()):
        raise CheckpointError(
            f"{folder} holds no weight of a {name}: {listed('its tensors are', sorted(held))} Give a folder with a "
            "model of this kind."
        )
    wrong = [f"{key} {message}" for key, value in model.state_dict().items() if (message := not_finite(value))]
    if wrong:
        raise CheckpointError(listed(f"{folder} does not fit {name} ({len(wrong)} of its tensors)", wrong))
    model.eval()
    return model, fresh


def _from_pretrained(
    kind: type[PreTrainedModel], folder: Path, config: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a folder as a class; return the model, and which tensors are missing, unexpected or of another shape."""
    register()
    with allowing_gaps():
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the loading information lists them with the other misfits
            output_loading_info=True,
        )
    model, info = loaded
    return model, info


def built(folder: Path, name: str, changes: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model with initial weights from the config.json of a folder, in evaluation mode.

    Args:
        folder: a folder with config.json.
        name: the name of a class of transformers.
        changes: fields of config.json to override.

    Raises:
        CheckpointError: it cannot be built.
    """
    kind = getattr(transformers, name)
    described = checked_config(read_config(folder), str(folder / _CONFIG))
    with sealed(), _explained(folder, kind):
        model: PreTrainedModel = kind(_config_class(kind, described).from_dict({**described, **changes}))
    model.eval()
    return model


def config_of(folder: Path, kind: type[PreTrainedModel]) -> Any:
    """Return the configuration in a folder, for a class of transformers.

    Raises:
        CheckpointError: a file is missing or damaged, or the configuration is of another class.
    """
    described, _ = _read(folder)
    with sealed(), _explained(folder, kind):
        return _config_class(kind, described).from_dict(described)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the checked content of config.json, and the weights on the meta device."""
    described, files = read_config(folder), weights(folder)
    held = {name: value for file in files for name, value in read_meta(file).items()}
    return checked_config(described, str(folder / _CONFIG), Held.of(held)), held


def weights(folder: Path) -> list[Path]:
    """Return the file of weights in a folder, or the shards that its index names.

    Raises:
        CheckpointError: there are none, the index is damaged, or it names files outside of the folder.
    """
    single, index = (folder / name for name in _WEIGHTS)
    if (folder / _ADAPTER).exists():
        raise CheckpointError(f"{folder} holds an adapter ({_ADAPTER}). Merge it into the model first.")
    parts = next(folder.glob(_PARTS_OF_PROCESSES), None)
    if parts is not None:
        raise CheckpointError(
            f"{folder} holds one part per process ({parts.name}). Save the whole model: save_pretrained."
        )
    if single.is_file() or not index.is_file():
        return safe_weights(folder, (_WEIGHTS[0],))
    shards = read_object(index, CheckpointError, "Fetch or write it again.").get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} should map tensors to files (weight_map). Fetch or write it again.")
    names = sorted(set(shards.values()))
    outside = next((name for name in names if not _FILE_NAME.fullmatch(name)), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {shortened(outside)}, which is not a file in its folder.")
    return [own_file(folder / name, folder) for name in names]


def architectures(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the class names in a folder's config.json, possibly none.

    Raises:
        CheckpointError: they are no list of names.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(
            f"{folder / _CONFIG}: architectures should be a list of names, found {shortened(named)}. Write it again."
        )
    return named


def _class_of(
    folder: Path, config: Mapping[str, Any], kind: str | type[PreTrainedModel] | None, *, strict: bool
) -> type[PreTrainedModel]:
    """Return the class to build: the requested one, which config.json must support, or the one that it names."""
    named = architectures(folder, config)
    found = kind
    if not isinstance(found, type):
        names = [found.rpartition(".")[2]] if found else named
        found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"{folder} holds a {kind or ' or '.join(named) or 'model without a name'}, which transformers "
            f"{transformers.__version__} does not have. Load it with its own class: YourModel.from_pretrained"
            f"({str(folder)!r}); after `import upop` that works for compressed models too."
        )
    expected = _config_class(found, config).model_type
    wrong = ""
    if named and found.__name__ not in named:
        wrong = f"holds a {' or '.join(named)}"
    elif config.get("model_type") != expected:
        wrong = f"holds a model of type {shortened(config.get('model_type'))}"
    if wrong:
        message = f"{folder} {wrong}, not a {found.__name__} (of type {expected!r})."
        if strict:
            raise CheckpointError(f"{message} Load it as its own class, or fetch it again.")
        warnings.warn(message, stacklevel=4)
    return found


def _config_class(kind: type[PreTrainedModel], config: Mapping[str, Any]) -> type[Any]:
    """Return the configuration class of a model; transformers builds some models from those of others."""
    named = config.get("model_type")
    pairs = (value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES"))
    if isinstance(named, str) and named in CONFIG_MAPPING:
        for pair in pairs:
            built = pair.get(named, ())
            if kind.__name__ in ((built,) if isinstance(built, str) else built):
                return CONFIG_MAPPING[named]
    own: type[Any] = kind.config_class  # type: ignore[assignment]
    return own


def _check_sizes(kind: type[PreTrainedModel], config: Any, held: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a configuration of a far larger model than the weights, before memory is allocated.

    Missing tensors and other shapes are found on loading, since names in the file may differ from the model's.
    """
    model: Any = meta_model(lambda: kind(copy.deepcopy(config)), len(held), str(folder))
    record = getattr(config, "quantization_config", None)
    if record is not None:
        cut_as_recorded(model, UpopConfig(**_record(record)))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    asked = sum(value.numel() for name, value in tensors.items() if name not in tied)
    numbers = sum(value.numel() for value in held.values())
    if asked > AT_MOST * numbers + BESIDE:
        name, value = max(tensors.items(), key=lambda each: each[1].numel())
        raise CheckpointError(
            f"{folder} does not fit {kind.__name__}: {_CONFIG} describes {asked:,} elements ({name} has shape "
            f"{tuple(value.shape)}), and the weights have {numbers:,}. Fetch or write it again."
        )


def _check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], held: Mapping[str, Tensor], folder: Path, *, strict: bool
) -> None:
    """Refuse weights that are missing, unexpected, of another shape or not finite.

    transformers knows which are tied, and which ones of older versions it no longer needs.
    """
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unknown {name}" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"{name} has shape {tuple(found)}, the model {tuple(mine)}"
        for name, found, mine in sorted(info["mismatched_keys"])
    ]
    problems += [
        f"{name} holds no floating-point numbers"
        for name, value in held.items()
        if name.endswith(".weight") and not value.is_floating_point()
    ]
    problems += [f"{name} {message}" for name, value in model.state_dict().items() if (message := not_finite(value))]
    if not problems:
        return
    message = listed(f"{folder} does not fit {type(model).__name__} ({len(problems)} of its tensors)", problems)
    if strict:
        raise CheckpointError(f"{message}\nstrict=False loads it all the same.")
    warnings.warn(message, stacklevel=4)


@contextmanager
def _explained(folder: Path, kind: type[PreTrainedModel]) -> Iterator[None]:
    """Turn whatever transformers raises on loading into a CheckpointError."""
    try:
        yield
    except UPopError:
        raise
    except Exception as error:  # OSError, RuntimeError, ValueError, SafetensorError
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} cannot be loaded as {kind.__name__}: {reason} Was it saved by this class, and is it whole?"
        ) from error


def _record(record: Any) -> dict[str, Any]:
    return dict(record) if isinstance(record, Mapping) else dict(record.to_dict())
