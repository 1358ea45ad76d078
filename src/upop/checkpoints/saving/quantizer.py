"""Lets transformers load compressed models: their configuration records how much every group keeps.

transformers lets a library register a `quant_method`, which reshapes a model before its weights are loaded. Upop's
makes layers smaller and quantizes nothing. It is registered when upop is imported; from then on `from_pretrained` of
any class, `pipeline`, `save_pretrained` and `push_to_hub` work on compressed models as on any other.
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
from upop.checkpoints.fitting.meta import meta_model
from upop.checkpoints.fitting.recorded_groups import groups_today, outermost, placed
from upop.checkpoints.fitting.sizes import Sizes, dense_meta_copy, resize, sizes_from_json, sizes_of
from upop.checkpoints.saving.loading_code import forget_code
from upop.errors import CheckpointError, SettingError
from upop.models import kind_of
from upop.pruning import find_prunable
from upop.pruning.carried import Record, keep_record
from upop.pruning.file_keys import RECORD, VERSION, current, is_readable
from upop.pruning.words import true_class
from upop.pruning.written import as_json, renamed

METHOD = "upop"
_ORDINARY = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOADED = "_is_hf_initialized"  # set by transformers on parameters that were loaded, or tied to such
_ALIGNMENT = 64  # bytes; that of tensors that torch allocates


_gaps: ContextVar[bool] = ContextVar("gaps", default=False)


@contextmanager
def allowing_gaps() -> Iterator[None]:
    """Allow compressed models with missing weights to be loaded within the block; the caller reports them."""
    before = _gaps.set(True)
    try:
        yield
    finally:
        _gaps.reset(before)


class UpopConfig(QuantizationConfigMixin):
    """The record in a transformers configuration of how much every group of a compressed model keeps.

    Args:
        kept: group -> [kept channels, channels of the dense model], for pruned groups.
        groups: group -> its JSON form, as in `upop.json`; older records have none.
        format: version of the record.
        upop_version: the version of upop that wrote it.

    Raises:
        CheckpointError: a later upop wrote it, or it is damaged.
    """

    def __init__(
        self,
        kept: Mapping[str, Any] | None = None,
        format: int = VERSION,
        upop_version: str = "",
        groups: Mapping[str, Any] | None = None,
        **_other: Any,
    ) -> None:
        if not is_readable(format):
            raise CheckpointError(
                f"The model's quantization_config has format {format!r}, written by upop {upop_version or '?'}; this "
                f"upop reads 1 to {VERSION}. Update upop."
            )
        self.quant_method: Any = METHOD  # an enumeration of transformers' own methods, in its own configurations
        self.format = VERSION  # in which it will be written
        self.upop_version = upop_version or upop.__version__
        self.kept = sizes_from_json(kept, "The model's quantization_config")
        if not isinstance(groups, Mapping | None):
            raise CheckpointError("The model's quantization_config should describe every group. Write it again.")
        self.groups = dict(current({"groups": groups or {}}, RECORD)["groups"])


class UpopQuantizer(HfQuantizer):
    """Cuts a model that transformers built from its configuration to the sizes of the saved weights."""

    requires_calibration = False
    quantization_config: UpopConfig

    def __init__(self, quantization_config: UpopConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise SettingError(
                "A quantization_config of kind 'upop' was given for a model that is not compressed. It only records "
                "what a compressed model keeps: compress with upop.Compression, or cut with upop.shrink(model, plan)."
            )

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        cut_as_recorded(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        # From here on it is an ordinary model: it can be cast, trained, compiled and quantized.
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
    """Register the quantizer with transformers, and `mark` with every cut; repeated calls do nothing."""
    keep_record(Record(refuse_quantized, mark))
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(UpopConfig)
        register_quantizer(METHOD)(UpopQuantizer)


def mark(model: nn.Module) -> None:
    """Record in the configuration of every transformers model within `model` how much it keeps.

    If all layers of each tower keep equally many channels, and fields of the configuration can express it, the model
    becomes an ordinary one of its class. Otherwise the configuration gets a record, which transformers reads with upop.
    Towers with a configuration of their own get their own record, so that they can be saved and loaded separately.
    A model that its configuration does not describe is left unchanged, with a warning.

    The record of an undone quantization, as of weights from a GGUF file, is removed.

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
    """Make a cut model an ordinary one of its class, if possible; return whether it is now."""
    groups = find_prunable(dense).groups if sizes else ()
    kept = {name: size for name, (size, _) in sizes.items()}
    return bool(sizes) and alike(dense, groups, kept) and become_plain(model, dense, groups, kept) is None


def recorded(config: Any) -> Sizes:
    """Return the kept sizes that a transformers configuration records; none for a dense model.

    Raises:
        CheckpointError: the record is damaged, or a later upop wrote it.
    """
    record = getattr(config, "quantization_config", None)
    if record is None or _method(record) != METHOD:
        return {}
    return UpopConfig(**_as_dict(record)).kept


def recorded_groups(config: Any) -> dict[str, tuple[Any, int]]:
    """Return group -> (its JSON form in the dense model, kept channels), as a transformers configuration records it.

    Raises:
        CheckpointError: the record is damaged, or a later upop wrote it.
    """
    kept = recorded(config)
    groups = UpopConfig(**_as_dict(config.quantization_config)).groups if kept else {}
    return {name: (groups[name], size) for name, (size, _) in kept.items() if name in groups}


def misfit(model: PreTrainedModel) -> str | None:
    """Return why transformers could not load a model, dense or compressed, again; None if it can.

    The model that its configuration builds must have the same tensors, except for cuts, and tie the same ones.
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
            return f"the model that it builds has no {name}"
        if list(value.shape) != shapes[name]:
            return f"{name} has shape {tuple(value.shape)}, that of the model that it builds {tuple(shapes[name])}"
    absent = next((name for name in dense.state_dict() if name not in mine), None)
    if absent is not None:
        return f"{absent} is missing; if layers were dropped, set their number in model.config"
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, first in shared_tensors(mine).items():
        if not {name, first} & {*tied, *tied.values()}:
            return f"{name} and {first} are one tensor here, and two in the model that it builds"
    return None


def refuse_quantized(model: nn.Module) -> None:
    """Raise a `SettingError` if a transformers model in `model` is quantized by another method.

    Weights that were dequantized on loading, as those of GGUF files, do not count: only the record is left.
    """
    for name, part in outermost(model):
        method = _other_method(part)
        if method is not None and not _is_as_built(part):
            raise SettingError(
                f"{name or type(part).__name__} has a quantization_config of kind {method!r}, and a configuration can "
                "hold only one. Compress first, save, and quantize the loaded model."
            )


def _other_method(part: PreTrainedModel) -> str | None:
    """Return the quantization method in a model's configuration or loader; None if there is none, or it is upop's."""
    record = getattr(part.config, "quantization_config", None)
    if record is None:
        record = getattr(getattr(part, "hf_quantizer", None), "quantization_config", None)
    method = METHOD if record is None else _method(record)
    return None if method == METHOD else method


def _is_as_built(part: PreTrainedModel) -> bool:
    """Whether a model, cut or not, has the modules of its class with tensors of ordinary types."""
    kind: Any = true_class(part)
    built: nn.Module = meta_model(lambda: kind(copy.deepcopy(part.config)))
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
    """Refuse a compressed model with weights that its file lacks, and that would stay random.

    If the file is of another class, a head may be missing, but none of the layers that were cut.
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
    """Copy tensors of a mapped file that are not aligned in memory.

    CPU kernels depend on the alignment: otherwise the last bits of the outputs differ from those before saving.
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
    """Yield the transformers models inside `whole` with a configuration of their own."""
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
    """Cut a dense model as recorded, and rename the groups in the record to the model's names.

    Raises:
        CheckpointError, PlanError: the record is damaged, or belongs to another model.
    """
    groups = _placed(model, record)
    if groups is None:
        record.kept, record.groups = _named_as_in(model, record.kept), {}
    else:
        record.kept = {new["name"]: record.kept[name] for name, new in groups.items()}
        record.groups = {new["name"]: new for new in groups.values()}
    resize(model, record.kept, record.groups)


def _placed(model: PreTrainedModel, record: UpopConfig) -> dict[str, dict[str, Any]] | None:
    """Return group -> its JSON form under the model's names, for groups that it has; None if the record lacks them.

    Names in a model with a head have a prefix that names in its base model lack.
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
                f"The model's quantization_config does not describe the group {name} ({error!r}). Write it again."
            ) from None
        if here is not None:
            found[name] = here
        elif _belongs(model, name):
            return None  # its modules were renamed
    return found


def _named_as_in(model: PreTrainedModel, sizes: Sizes) -> Sizes:
    """Return the sizes under the group names of `model`, which has the same base model or is a part of it."""
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
            named[name] = kept  # no group where one should be; `resize` raises
    return named


def _forms(name: str, prefix: str) -> tuple[str, str, str]:
    return name, prefix + name, name.removeprefix(prefix)


def _belongs(model: PreTrainedModel, name: str) -> bool:
    """Whether a model should have a group of this name.

    It need not if the class lacks that part, or if the layer was dropped after the cut.
    """
    forms = _forms(name, f"{model.base_model_prefix}.")
    near = next((form for form in forms if hasattr(model, form.partition(".")[0])), None)
    return near is not None and not _is_dropped(model, near)


def _is_dropped(model: nn.Module, name: str) -> bool:
    """Whether the name leads to a layer beyond the end of its list."""
    place: Any = model
    for part in name.split("."):
        if isinstance(place, nn.ModuleList) and part.isdigit() and int(part) >= len(place):
            return True
        place = getattr(place, part, None)
    return False
