"""transformers reloads compressed models by itself: their configuration says what every layer keeps.

transformers lets a library register a `quant_method`, and asks it to reshape a model before the weights are read.
Ours makes layers smaller and quantizes nothing. It is registered when upop is imported; from then on `from_pretrained`
(of any class, in `pipeline` too), `save_pretrained` and `push_to_hub` work on compressed models as on others.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import upop
from upop.checkpoints.configs.plain import alike, become_plain
from upop.checkpoints.files.weights import shared_tensors
from upop.checkpoints.fitting.fit import kept_sizes, listed
from upop.checkpoints.fitting.likeness import cut_shapes
from upop.checkpoints.fitting.meta import outline
from upop.checkpoints.fitting.recorded_groups import groups_today, outermost, placed
from upop.checkpoints.fitting.sizes import Sizes, dense_meta_copy, resize, sizes_from_json, sizes_of
from upop.checkpoints.saving.loading_code import forget_code
from upop.errors import CheckpointError, SettingError
from upop.models import kind_of
from upop.pruning import find_prunable
from upop.pruning.carried import Record, keep_record
from upop.pruning.words import true_class
from upop.pruning.written import as_json, renamed

METHOD = "upop"
_FORMAT = 1
_ORDINARY = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOADED = "_is_hf_initialized"  # what transformers notes on parameters that it has read, or tied to such
_ALIGNMENT = 64  # bytes; where torch puts fresh tensors


_gaps: ContextVar[bool] = ContextVar("gaps", default=False)


@contextmanager
def allowing_gaps() -> Iterator[None]:
    """Let compressed models be loaded in this block whose weights are not all there; who loads them says so."""
    before = _gaps.set(True)
    try:
        yield
    finally:
        _gaps.reset(before)


class UpopConfig(QuantizationConfigMixin):
    """The part of a transformers configuration that says how much of every group a compressed model keeps.

    Args:
        kept: group -> [kept channels, channels of the dense model]; groups that lost none are left out.
        groups: group -> all that a cut of it takes, as `upop.json` has it; older records have none.
        format: of this record.
        upop_version: that wrote it.

    Raises:
        CheckpointError: a later upop wrote it, or it is damaged.
    """

    def __init__(
        self,
        kept: Mapping[str, Any] | None = None,
        format: int = _FORMAT,
        upop_version: str = "",
        groups: Mapping[str, Any] | None = None,
        **_other: Any,
    ) -> None:
        if format != _FORMAT:
            raise CheckpointError(
                f"The model's quantization_config has format {format!r}, written by upop {upop_version or '?'}; this "
                f"upop reads {_FORMAT}. Update upop."
            )
        self.quant_method: Any = METHOD  # an enumeration of transformers' own methods, in its own configurations
        self.format = format
        self.upop_version = upop_version or upop.__version__
        self.kept = sizes_from_json(kept, "The model's quantization_config")
        if not isinstance(groups, Mapping | None):
            raise CheckpointError(
                "The model's quantization_config should say of every group how it is cut. Write it again."
            )
        self.groups = dict(groups or {})


class UpopQuantizer(HfQuantizer):
    """Cuts the model that transformers has built from a configuration to the sizes that its weights have."""

    requires_calibration = False
    quantization_config: UpopConfig

    def __init__(self, quantization_config: UpopConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise SettingError(
                "quantization_config of kind 'upop' was given for a model that is not compressed. It only says what a "
                "compressed model keeps: compress with upop.Pruner, or cut with upop.shrink(model, plan)."
            )

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        cut_as_recorded(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        # It is an ordinary model with smaller layers: it may be cast, trained, compiled and quantized like any other.
        if not _gaps.get():
            _refuse_gaps(model, self.quantization_config)
        record = self.quantization_config.to_dict()
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        model.config.quantization_config = record
        forget_code(model.config)
        _align(model)
        return model

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Compressed models can be trained."""
        return True


def register() -> None:
    """Make compressed models known to transformers, and cuts known to its models; again, it does nothing."""
    keep_record(Record(refuse_quantized, mark))
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(UpopConfig)
        register_quantizer(METHOD)(UpopQuantizer)


def mark(model: nn.Module) -> None:
    """Write into the configuration of every transformers model in `model` how much it keeps.

    Where all layers of its towers keep equally many, and the configuration's own numbers can say it, they do: the model
    is then an ordinary one of its class. Else the configuration gets a record, which transformers reads with upop.
    Towers that have a configuration of their own get their own record, so that they can be saved and loaded alone.
    A model that its configuration does not describe is left as it is, with a warning.

    What is left in it of a quantization that was undone, as of weights that were read from a GGUF file, goes.

    Raises:
        SettingError: the model is quantized by another method.
    """
    refuse_quantized(model)
    for _, part in outermost(model):
        if _other_method(part) is not None:
            _forget_quantization(part)
    for name, whole in () if kind_of(model) else outermost(model):
        try:
            dense = dense_meta_copy(whole)
            sizes = sizes_of(whole, dense)
            if _is_plain(whole, dense, sizes):
                continue
            written = {group.name: as_json(group) for group in find_prunable(dense).groups if group.name in sizes}
            groups = {name: content for name, content in written.items() if content is not None}
        except Exception as error:  # constructors raise what they like
            warnings.warn(
                f"{name or type(whole).__name__} is not what its configuration builds ({error}), so from_pretrained "
                "will not load it again. Save it with upop.save, and load it with upop.load_into.",
                stacklevel=2,
            )
            continue
        _set(whole.config, sizes, groups)
        for prefix, part in _own_configs(whole):
            start = f"{prefix}."
            own = {name for name in sizes if name.startswith(start)}
            inside = {name.removeprefix(start): renamed(groups[name], _without(start)) for name in own & groups.keys()}
            _set(part.config, {name.removeprefix(start): sizes[name] for name in own}, inside)


def _is_plain(model: PreTrainedModel, dense: nn.Module, sizes: Sizes) -> bool:
    """Whether a cut model could be made an ordinary one of its class; it is then."""
    groups = find_prunable(dense).groups if sizes else ()
    kept = {name: size for name, (size, _) in sizes.items()}
    return bool(sizes) and alike(dense, groups, kept) and become_plain(model, dense, groups, kept) is None


def recorded(config: Any) -> Sizes:
    """Return what a transformers configuration says of the kept sizes; nothing if it describes a dense model.

    Raises:
        CheckpointError: the record is damaged, or a later upop wrote it.
    """
    record = getattr(config, "quantization_config", None)
    if record is None or _method(record) != METHOD:
        return {}
    return UpopConfig(**_as_dict(record)).kept


def misfit(model: PreTrainedModel) -> str | None:
    """Say why transformers could not load a model, dense or compressed, again; None if it can.

    What its configuration builds must have all of its tensors, but for what is cut, and tie the same of them.
    """
    try:
        dense = dense_meta_copy(model)
        groups = find_prunable(dense).groups
        mine = model.state_dict()
        shapes = cut_shapes(dense, groups, kept_sizes(groups, mine, type(model).__name__))
    except Exception as error:  # constructors raise what they like
        return str(error) or type(error).__name__
    for name, value in mine.items():
        if name not in shapes:
            return f"{name} is no part of it"
        if list(value.shape) != shapes[name]:
            return f"{name} has shape {tuple(value.shape)}, it makes {tuple(shapes[name])}"
    absent = next((name for name in dense.state_dict() if name not in mine), None)
    if absent is not None:
        return f"it makes {absent}, which is not there; if layers were dropped, have model.config say how many are left"
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, first in shared_tensors(mine).items():
        if not {name, first} & {*tied, *tied.values()}:
            return f"{name} is {first} here, and in it they are two"
    return None


def refuse_quantized(model: nn.Module) -> None:
    """Raise a `SettingError` if a transformers model in `model` is quantized by another method.

    Weights that were unpacked when they were read, as those of GGUF files are, are not: only the record is left.
    """
    for name, part in outermost(model):
        method = _other_method(part)
        if method is not None and not _is_as_built(part):
            raise SettingError(
                f"{name or type(part).__name__} has a quantization_config of kind {method!r}, and a "
                "configuration holds one alone. Compress first, save, and quantize what was loaded."
            )


def _other_method(part: PreTrainedModel) -> str | None:
    """Return the method that a model was quantized by, as its configuration or what it was read with says."""
    record = getattr(part.config, "quantization_config", None)
    if record is None:
        record = getattr(getattr(part, "hf_quantizer", None), "quantization_config", None)
    method = METHOD if record is None else _method(record)
    return None if method == METHOD else method


def _is_as_built(part: PreTrainedModel) -> bool:
    """Whether a model, cut or not, has the modules that its class builds, and ordinary numbers in them."""
    kind: Any = true_class(part)
    built: nn.Module = outline(lambda: kind(copy.deepcopy(part.config)))
    expected, found = built.state_dict(), part.state_dict()
    return (
        [(name, true_class(module)) for name, module in part.named_modules()]
        == [(name, type(module)) for name, module in built.named_modules()]
        and found.keys() == expected.keys()
        and all(
            type(value) is Tensor and (value.dtype == expected[name].dtype or value.dtype in _ORDINARY)
            for name, value in found.items()
        )
    )


def _forget_quantization(part: PreTrainedModel) -> None:
    reader = getattr(part, "hf_quantizer", None)
    if reader is not None:
        reader.remove_quantization_config(part)
    if getattr(part.config, "quantization_config", None) is not None:
        del part.config.quantization_config


def _refuse_gaps(model: PreTrainedModel, record: UpopConfig) -> None:
    """Refuse a compressed model with random numbers where its file has none.

    A class that the file is not of may have a head of its own; the layers that were cut have to be there.
    """
    marked = {name: bool(getattr(value, _LOADED, False)) for name, value in model.named_parameters()}
    missing = [name for name, loaded in marked.items() if not loaded] if any(marked.values()) else []
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or ()):
        cut = {part["tensor"] for group in record.groups.values() for part in group["slices"]}
        if not cut:
            cut = {
                part.tensor
                for group in find_prunable(model).groups
                if group.name in record.kept
                for part in group.slices
            }
        missing = [name for name in missing if name in cut]
    if missing:
        raise CheckpointError(
            listed(
                f"{model.config.name_or_path} does not fit {type(model).__name__} ({len(missing)} of its tensors)",
                [f"missing {name}" for name in missing],
            )
        )


def _align(model: nn.Module) -> None:
    """Copy weights that lie at odd places in memory, as odd sizes do in a mapped file, to where fresh ones would lie.

    The processor's kernels depend on it: without this the last bits of the outputs differ from those that were saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _as_dict(record: Any) -> dict[str, Any]:
    return dict(record) if isinstance(record, Mapping) else dict(record.to_dict())


def _method(record: Any) -> str:
    method = _as_dict(record).get("quant_method")
    return str(getattr(method, "value", method))


def _set(config: Any, sizes: Sizes, groups: Mapping[str, Any]) -> None:
    if sizes:
        config.quantization_config = UpopConfig(sizes, groups=groups).to_dict()
    elif hasattr(config, "quantization_config") and _method(config.quantization_config) == METHOD:
        del config.quantization_config


def _without(start: str) -> Callable[[str], str]:
    return lambda path: path.removeprefix(start)


def _own_configs(whole: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the transformers models inside `whole` whose configuration no other one has."""
    users: dict[int, list[tuple[str, PreTrainedModel]]] = {id(whole.config): [("", whole)]}
    for name, module in whole.named_modules():
        if name and isinstance(module, PreTrainedModel):
            using = users.setdefault(id(module.config), [])
            if not any(not up or name.startswith(f"{up}.") for up, _ in using):
                using.append((name, module))
    for using in users.values():
        if len(using) == 1 and using[0][0]:
            yield using[0]


def cut_as_recorded(model: PreTrainedModel, record: UpopConfig) -> None:
    """Cut a dense model as its configuration says, and have the record name the groups as they are called in it.

    Raises:
        CheckpointError, PlanError: the record is damaged, or is of a model that this one is not.
    """
    groups = _placed(model, record)
    if groups is None:
        record.kept, record.groups = _named_as_in(model, record.kept), {}
    else:
        record.kept = {new["name"]: record.kept[name] for name, new in groups.items()}
        record.groups = {new["name"]: new for new in groups.values()}
    resize(model, record.kept, record.groups)


def _placed(model: PreTrainedModel, record: UpopConfig) -> dict[str, dict[str, Any]] | None:
    """Return group -> its JSON under the model's names, of what the model has; None where the record does not say it.

    A model with a head names the groups of its base with a prefix, the base alone does not.
    """
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in record.kept:
        try:
            content = record.groups[name]
            here = placed(model, content, (lambda path: prefix + path, lambda path: path.removeprefix(prefix)))
        except KeyError:
            return None
        except (AttributeError, TypeError) as error:
            raise CheckpointError(
                f"The model's quantization_config says of {name} what is no group ({error!r}). Write the model again."
            ) from None
        if here is not None:
            found[name] = here
        elif _belongs(model, name):
            return None  # its modules have other names now
    return found


def _named_as_in(model: PreTrainedModel, sizes: Sizes) -> Sizes:
    """Return the sizes under the names that the groups have in `model`, a model with the same base or a part of it."""
    groups = {group.name for group in find_prunable(model).groups}
    prefix = f"{model.base_model_prefix}."
    other = groups_today(model, [form for name in sizes for form in _forms(name, prefix)])
    named: Sizes = {}
    for name, kept in sizes.items():
        candidates = [other.get(form, form) for form in _forms(name, prefix)]
        found = next((candidate for candidate in candidates if candidate in groups), None)
        if found is not None:
            named[found] = kept
        elif _belongs(model, name):
            named[name] = kept  # no group, where one should be: `resize` says so
    return named


def _forms(name: str, prefix: str) -> tuple[str, str, str]:
    return name, prefix + name, name.removeprefix(prefix)


def _belongs(model: PreTrainedModel, name: str) -> bool:
    """Whether a group of this name should be in a model.

    It may be of a part that its class does not have, such as the decoder of a model for retrieval, or of a layer that
    was dropped after the cut.
    """
    forms = _forms(name, f"{model.base_model_prefix}.")
    near = next((form for form in forms if hasattr(model, form.partition(".")[0])), None)
    return near is not None and not _is_dropped(model, near)


def _is_dropped(model: nn.Module, name: str) -> bool:
    """Whether a group's name leads to a layer beyond the end of its list."""
    place: Any = model
    for part in name.split("."):
        if isinstance(place, nn.ModuleList) and part.isdigit() and int(part) >= len(place):
            return True
        place = getattr(place, part, None)
    return False
