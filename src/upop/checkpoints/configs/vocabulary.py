"""Removes tokens that a task never uses from word embeddings and output heads.

Every tensor with one row per token is cut alike. The result is verified: on texts of the kept tokens the model gives
the same outputs, without the logits of the removed tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upop.checkpoints.configs.builders import changed, nodes, with_fields, without_record
from upop.checkpoints.configs.smaller_tokenizer import is_fast, needed_ids, smaller_tokenizer, used_ids
from upop.checkpoints.fitting.carried import VOCABULARY
from upop.checkpoints.fitting.meta import meta_model
from upop.errors import LayoutError, SettingError, VerificationError
from upop.libraries import is_pretrained
from upop.pruning.axes.examples import example_for
from upop.pruning.beforehand import note_lost
from upop.pruning.costs import call, count_parameters, evaluating
from upop.pruning.json_text import parse_json
from upop.pruning.masks import unwrapped
from upop.pruning.shrink import Exchange
from upop.pruning.verify import tensors_of
from upop.pruning.words import true_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_A_TOKEN = re.compile(r"(^|_)(token_ids?|token_index|token)$|suppress_tokens$")
_TEXTS, _LENGTH = 4, 8
_CLOSE = 1e-4
"""Largest difference relative to the largest element: fewer columns are summed in another order."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that were kept.

    Attributes:
        kept: original token ids, ascending; a token's index here is its new id.
        size: original number of tokens.
        tokenizer: a tokenizer that returns the new ids; None if no fast tokenizer was given.
    """

    kept: tuple[int, ...]
    size: int
    tokenizer: Any = None

    def encode(self, ids: Tensor) -> Tensor:
        """Return the new ids of tokens, in the shape of `ids`.

        Raises:
            SettingError: a token was removed.
        """
        kept = torch.tensor(self.kept, device=ids.device)
        found = torch.searchsorted(kept, ids).clamp_max(len(kept) - 1)
        removed = ids[kept[found] != ids]
        if len(removed):
            raise SettingError(f"Token {int(removed[0])} was removed: the vocabulary keeps {len(kept)} tokens.")
        return found

    def decode(self, ids: Tensor) -> Tensor:
        """Return the original ids of tokens from their new ones."""
        return torch.tensor(self.kept, device=ids.device)[ids]


def reduce_vocabulary(
    model: PreTrainedModel, vocabulary: str | Path | Iterable[str] | Iterable[int], tokenizer: Any = None
) -> Vocabulary:
    """Remove tokens that a task never uses from word embeddings and output heads, in place.

    Call it before or after a cut, but not within a training: optimizers are not updated. A target of parameters for the
    same object, such as `target={"params": 0.5}`, counts the removed rows as reached. The configuration, the generation
    settings and the returned tokenizer have the new ids:

        vocabulary = upop.reduce_vocabulary(model, "captions.txt", tokenizer)
        upop.save(model, "smaller", tokenizer=vocabulary.tokenizer)

    Args:
        model: a transformers model.
        vocabulary: a file or its content: texts, one per line, or token ids (a JSON list). Special tokens, tokens that
            the configuration names, and the pieces that kept tokens are merged from are kept too.
        tokenizer: a fast tokenizer of transformers; required for texts.

    Returns:
        The kept tokens, and the tokenizer for them.

    Raises:
        SettingError: no token is named, texts come without a tokenizer, or the model is not from transformers.
        LayoutError: no field of the configuration sets the vocabulary size, or the model has no word embeddings.
        VerificationError: the outputs would differ. In every case the model is unchanged.
    """
    whole: Any = unwrapped(model)
    if not is_pretrained(whole):
        raise SettingError(f"reduce_vocabulary() takes transformers models; found a {type(whole).__name__}.")
    size = _words(whole).num_embeddings
    found = chosen_words(vocabulary, tokenizer, size, _named_ids(whole, size))
    before = count_parameters(whole)
    if len(found.kept) < size:
        _apply(whole, found)
    note_words(whole, found, getattr(whole, VOCABULARY, None), before)
    return found


def chosen_words(vocabulary: Any, tokenizer: Any, size: int, needed: Iterable[int]) -> Vocabulary:
    """Return the tokens to keep, with their tokenizer.

    Args:
        vocabulary: as for `reduce_vocabulary`.
        tokenizer: as for `reduce_vocabulary`.
        size: size of the model's vocabulary.
        needed: token ids that the model needs.

    Raises:
        SettingError: no token is named, texts come without a tokenizer, or an id is not in the vocabulary.
        VerificationError: a text would be split differently.
    """
    values = read_vocabulary(vocabulary)
    texts, used = [each for each in values if isinstance(each, str)], {each for each in values if type(each) is int}
    if texts and tokenizer is None:
        raise SettingError("A vocabulary of texts was given without a tokenizer. Give the model's own, or token ids.")
    used |= used_ids(tokenizer, texts) if texts else set()
    if not used:
        raise SettingError("The vocabulary has neither texts nor tokens. Give what the task uses.")
    used |= {*needed}
    used = needed_ids(tokenizer, used) if is_fast(tokenizer) else used
    outside = [number for number in used if not 0 <= number < size]
    if outside:
        raise SettingError(f"Token id {outside[0]} is not in the model's vocabulary of {size}.")
    kept = sorted(used)
    return Vocabulary(tuple(kept), size, smaller_tokenizer(tokenizer, kept, texts) if is_fast(tokenizer) else None)


def note_words(model: nn.Module, found: Vocabulary, before: Sequence[int] | None, parameters: int) -> None:
    """Note what a model lost: a target of parameters counts it as reached, and a saved model names its tokens.

    Args:
        model: the model, without the removed tokens.
        found: the kept tokens.
        before: the original ids of its tokens, if it lost some earlier.
        parameters: how many the model had.
    """
    setattr(model, VOCABULARY, [number if before is None else before[number] for number in found.kept])
    example = next(each for each in model.parameters() if each.is_floating_point())
    note_lost(model, parameters - count_parameters(model), example)


def read_vocabulary(vocabulary: Any) -> list[str | int]:
    """Return the texts and token ids of a vocabulary.

    Args:
        vocabulary: as for `reduce_vocabulary`.

    Raises:
        SettingError: the file cannot be read, holds nothing, or there is something else among them.
    """
    if isinstance(vocabulary, str | Path):
        try:
            content = Path(vocabulary).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"The vocabulary {vocabulary} cannot be read as text: {error}.") from error
        lines = content.splitlines()
        if content.lstrip().startswith("["):
            try:
                lines = parse_json(content)
            except ValueError as error:
                raise SettingError(f"{vocabulary} begins like a JSON list, but is none: {error}.") from error
        if all(isinstance(line, str) and not line.strip() for line in lines):
            raise SettingError(f"The vocabulary {vocabulary} is empty. Write texts of the task into it, one per line.")
        vocabulary = lines
    values = list(vocabulary)
    if not all(isinstance(each, str | int) and not isinstance(each, bool) for each in values):
        raise SettingError("A vocabulary is texts or token ids; found something else among them.")
    return values


def _named_ids(model: Any, size: int) -> set[int]:
    """Return the token ids in a model's configuration and generation settings."""
    found: set[int] = set()
    for _, values in _described(model, size):
        found.update(values)
    return found


def _described(model: Any, size: int) -> Iterable[tuple[tuple[Any, tuple[str, ...]], list[int]]]:
    """Yield the fields that hold token ids (the settings, and the path in them), and the ids."""
    for settings in (model.config, getattr(model, "generation_config", None)):
        for path, fields in nodes(settings.to_dict()) if settings is not None else ():
            for name, value in fields.items():
                numbers = value if isinstance(value, list | tuple) else [value]
                if _OF_A_TOKEN.search(name) and numbers and all(type(each) is int for each in numbers):
                    named = [number for number in numbers if 0 <= number < size]
                    if named:
                        yield (settings, (*path, name)), named


def _apply(model: Any, vocabulary: Vocabulary) -> None:
    """Remove tokens from a model and verify it; undo everything if the outputs differ."""
    kept, size = torch.tensor(vocabulary.kept), vocabulary.size
    new = {old: place for place, old in enumerate(vocabulary.kept)}
    renumbered: dict[int, dict[tuple[str, ...], Any]] = {}
    for (settings, path), _ in _described(model, size):
        held = _at(settings.to_dict(), path)
        value = [new.get(each, each) for each in held] if isinstance(held, list | tuple) else new[held]
        renumbered.setdefault(id(settings), {})[path] = value
    change, follow = _smaller(model, size, len(kept), renumbered.get(id(model.config), {}))
    drawn = torch.randint(len(kept), (_TEXTS, _LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = kept[drawn].to(model.device)
    taking = _taking(model, inputs)
    before = _outputs(model, taking(inputs))
    tensors = [(tensor, follow[name]) for name, tensor in _tensors(model).items() if name in follow]
    undo: list[Any] = []
    config, generation = copy.deepcopy(vars(model.config)), copy.deepcopy(getattr(model, "generation_config", None))
    numbers: list[tuple[nn.Module, str, Any]] = []
    try:
        for tensor, dim in tensors:
            left = tensor.detach().index_select(dim, kept.to(tensor.device))
            if isinstance(tensor, nn.Parameter):
                undo.append(Exchange(tensor, left, None).apply())
            else:
                undo.append((tensor, tensor.data))
                tensor.data = left
        fresh = _built(model, change)
        for module, name, value in _differing(model, _built(model, {}), fresh):
            numbers.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        with_fields(model.config, change)
        if generation is not None:
            with_fields(model.generation_config, renumbered.get(id(model.generation_config), {}))
        _check(model, before, _outputs(model, taking(drawn.to(model.device))), kept, size)
    except BaseException:
        for module, name, value in numbers:
            setattr(module, name, value)
        for edit in reversed(undo):
            if isinstance(edit, Exchange):
                edit.apply()
            else:
                edit[0].data = edit[1]
        vars(model.config).clear()
        vars(model.config).update(config)
        if generation is not None:
            model.generation_config = generation
        raise


def _at(settings: Any, path: Sequence[str]) -> Any:
    for part in path:
        settings = settings[part]
    return settings


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, each shared one once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _smaller(model: Any, size: int, left: int, renumbered: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, int]]:
    """Find the configuration fields that set the vocabulary size, by trial.

    A field qualifies if it changes nothing but dimensions of this size, those of the word embeddings included.

    Returns:
        The change of the configuration, and the tensors that follow it: name -> dimension of the tokens.
    """
    old = {name: tuple(value.shape) for name, value in _tensors(_built(model, {})).items()}
    words = next(name for name, value in _tensors(model).items() if value is _words(model).weight)
    fields = [
        (*path, name)
        for path, values in nodes(without_record(model.config).to_dict())
        for name, value in values.items()
        if type(value) is int and value == size
    ]
    for named in [*([each] for each in fields), fields]:
        change = {**renumbered, **dict.fromkeys(named, left)}
        try:
            new = {name: tuple(value.shape) for name, value in _tensors(_built(model, change)).items()}
        except Exception:  # constructors raise what they like
            continue
        follow = {
            name: _along(shape, new.get(name, ()), size, left) for name, shape in old.items() if shape != new.get(name)
        }
        if words in follow and all(dim is not None for dim in follow.values()) and old.keys() == new.keys():
            return change, {name: dim for name, dim in follow.items() if dim is not None}
    raise LayoutError(
        f"No field of {type(model.config).__name__} sets the vocabulary size of {type(model).__name__} ({size}), so a "
        "smaller vocabulary could not be loaded again."
    )


def _along(old: Sequence[int], new: Sequence[int], size: int, left: int) -> int | None:
    """Return the dimension that changed from `size` to `left`; None for any other change."""
    dims = [dim for dim, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
    return dims[0] if len(old) == len(new) and len(dims) == 1 and (old[dims[0]], new[dims[0]]) == (size, left) else None


def _built(model: Any, change: Mapping[Any, Any]) -> nn.Module:
    """Return the dense model of a changed configuration, on the meta device."""
    kind: Any = true_class(model)
    settings = changed(without_record(model.config).to_dict(), change)
    return meta_model(lambda: kind(type(model.config).from_dict(settings)))


def _differing(model: nn.Module, old: nn.Module, new: nn.Module) -> Iterable[tuple[nn.Module, str, Any]]:
    """Yield numbers that modules store and that differ between the models of two configurations."""
    fresh = dict(new.named_modules())
    mine = dict(model.named_modules())
    for path, module in old.named_modules():
        if path in mine and path in fresh:
            for name, value in vars(module).items():
                other = vars(fresh[path]).get(name)
                if type(value) is int and type(other) is int and value != other:
                    yield mine[path], name, other


def _words(model: nn.Module) -> nn.Embedding:
    """Return the word embeddings of a model: its own, or those of the only part that has some.

    Raises:
        LayoutError: it has none, or several.
    """
    found: dict[int, nn.Embedding] = {}
    for module in model.modules():  # the model itself comes first
        try:
            words = module.get_input_embeddings() if is_pretrained(module) else None
        except NotImplementedError:  # such as those of images and of texts side by side
            continue
        if isinstance(words, nn.Embedding):
            if module is model:
                return words
            found[id(words)] = words
    if len(found) != 1:
        raise LayoutError(
            f"{type(model).__name__} has {'several word embeddings' if found else 'no word embeddings'}; a smaller "
            "vocabulary needs exactly one."
        )
    return next(iter(found.values()))


def _taking(model: Any, ids: Tensor) -> Callable[[Tensor], Mapping[str, Any]]:
    """Return what a model is called with, as a function of token ids.

    Args:
        model: the model, as it is.
        ids: some of its token ids, [texts, length].

    Raises:
        LayoutError: it does not run on ids, or on ids with what else it takes.
    """
    more = ("decoder_input_ids",) if getattr(model.config, "is_encoder_decoder", False) else ()

    def alone(given: Tensor) -> Mapping[str, Any]:
        return dict.fromkeys(("input_ids", *more), given)

    try:
        _outputs(model, alone(ids))
        return alone
    except Exception as error:  # the model's own
        found = example_for(model)
        if not isinstance(found, Mapping) or "input_ids" not in found:
            raise LayoutError(
                f"{type(model).__name__} does not run on token ids alone ({type(error).__name__}: {error}), so a "
                "smaller vocabulary cannot be verified."
            ) from error
        example: Mapping[str, Any] = found
        shape = example["input_ids"].shape

        def beside(given: Tensor) -> Mapping[str, Any]:
            flat = given.flatten()
            return {**example, "input_ids": flat.repeat(-(-shape.numel() // len(flat)))[: shape.numel()].view(shape)}

        return beside


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    with evaluating(model):
        return dict(tensors_of(call(model, inputs)))


def _check(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], kept: Tensor, size: int
) -> None:
    """Raise unless the outputs are the same, without the logits of the removed tokens."""
    for name, old in before.items():
        if old.is_floating_point() and old.dim() and old.shape[-1] == size:
            old = old.index_select(-1, kept.to(old.device))
        found = after.get(name)
        wrong = found is None or found.shape != old.shape
        if not wrong and found is not None and old.is_floating_point():
            close = _CLOSE if old.dtype in (torch.float32, torch.float64) else 100 * _CLOSE
            wrong = not bool((found - old).abs().max() <= close * old.abs().max().clamp_min(1e-12))
        if wrong:
            raise VerificationError(
                f"With a smaller vocabulary {type(model).__name__} would compute another {name}. The model is "
                "unchanged; please report this."
            )
