"""Words that a task never uses: their rows of a model's word embeddings go, and its heads follow.

What has as many rows as there are words is cut alike, and the result is proved: on texts of the words that stay the
model computes what it did, with the scores of the other words left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upop.checkpoints.configs.builders import changed, nodes, with_fields, without_record
from upop.checkpoints.configs.smaller_tokenizer import is_fast, needed_ids, smaller_tokenizer, used_ids
from upop.checkpoints.fitting.carried import VOCABULARY
from upop.checkpoints.fitting.meta import outline
from upop.errors import LayoutError, SettingError, VerificationError
from upop.libraries import is_pretrained
from upop.pruning.costs import call, evaluating
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
"""What outputs may differ by, as a share of the largest entry: fewer columns are summed in another order."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that stayed, by the numbers that they had.

    Attributes:
        kept: ascending; a word's place in it is its number now.
        size: how many words there were.
        tokenizer: that gives the new numbers; None where none was given that could.
    """

    kept: tuple[int, ...]
    size: int
    tokenizer: Any = None

    def encode(self, ids: Tensor) -> Tensor:
        """Return the new numbers of words, of the shape of `ids`.

        Raises:
            SettingError: a word went.
        """
        kept = torch.tensor(self.kept, device=ids.device)
        found = torch.searchsorted(kept, ids).clamp_max(len(kept) - 1)
        gone = ids[kept[found] != ids]
        if len(gone):
            raise SettingError(f"Token {int(gone[0])} was dropped from the vocabulary, of which {len(kept)} are left.")
        return found

    def decode(self, ids: Tensor) -> Tensor:
        """Return the numbers that words had, from those that they have now."""
        return torch.tensor(self.kept, device=ids.device)[ids]


def reduce_vocabulary(
    model: PreTrainedModel, vocabulary: str | Path | Iterable[str] | Iterable[int], tokenizer: Any = None
) -> Vocabulary:
    """Drop the rows of word embeddings that a task never uses, and the outputs of heads with them, in place.

    Do it before or after a cut, and outside of a training: optimizers are not changed. The configuration, the
    generation settings and the tokenizer that is returned have the new numbers:

        vocabulary = upop.reduce_vocabulary(model, "captions.txt", tokenizer)
        upop.save(model, "smaller", tokenizer=vocabulary.tokenizer)

    Args:
        model: one of transformers.
        vocabulary: a file, or its content: texts, one in a line, or token numbers (a JSON list). What special tokens
            and the configuration name stays too, as do the pieces that other ones are merged from.
        tokenizer: a fast one of transformers; needed for texts.

    Returns:
        What stayed, with the tokenizer.

    Raises:
        SettingError: nothing is named, texts have no tokenizer, or the model is none of transformers.
        LayoutError: the model's configuration has no number for its words, or it has no word embeddings.
        VerificationError: it would compute something else. In every case nothing was changed.
    """
    whole: Any = unwrapped(model)
    if not is_pretrained(whole):
        raise SettingError(
            f"reduce_vocabulary() takes models of transformers; found a {type(whole).__name__}, whose words are "
            "another library's own."
        )
    words = whole.get_input_embeddings()
    if not isinstance(words, nn.Embedding):
        raise LayoutError(f"{type(whole).__name__} has no word embeddings that could be made fewer.")
    size = words.num_embeddings
    found = chosen_words(vocabulary, tokenizer, size, _told_ids(whole, size))
    if len(found.kept) < size:
        _apply(whole, found)
    note_words(whole, found, getattr(whole, VOCABULARY, None))
    return found


def chosen_words(vocabulary: Any, tokenizer: Any, size: int, told: Iterable[int]) -> Vocabulary:
    """Return the words that stay of `size`, with their tokenizer.

    Args:
        vocabulary: as for `reduce_vocabulary`.
        tokenizer: as for `reduce_vocabulary`.
        size: how many words there are.
        told: numbers of words that a model needs.

    Raises:
        SettingError: nothing is named, texts have no tokenizer, or a word is none of the model's.
        VerificationError: a text would be cut otherwise.
    """
    texts, used = _read(vocabulary)
    if texts and tokenizer is None:
        raise SettingError("A vocabulary of texts was given, and no tokenizer. Give the model's own, or token ids.")
    used |= used_ids(tokenizer, texts) if texts else set()
    if not used:
        raise SettingError("A vocabulary was given that has no text and no token. Name what the task uses.")
    used |= {*told}
    used = needed_ids(tokenizer, used) if is_fast(tokenizer) else used
    outside = [number for number in used if not 0 <= number < size]
    if outside:
        raise SettingError(f"Token {outside[0]} is none of the model's {size} words.")
    kept = sorted(used)
    return Vocabulary(tuple(kept), size, smaller_tokenizer(tokenizer, kept, texts) if is_fast(tokenizer) else None)


def note_words(model: nn.Module, found: Vocabulary, before: Sequence[int] | None) -> None:
    """Note on a model what numbers its words had at first; `before` are those of the words that there were."""
    setattr(model, VOCABULARY, [number if before is None else before[number] for number in found.kept])


def _read(vocabulary: Any) -> tuple[list[str], set[int]]:
    """Return texts and token numbers."""
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
                raise SettingError(f"{vocabulary} begins like a JSON list and is none: {error}.") from error
        vocabulary = lines
    values = list(vocabulary)
    numbers = {each for each in values if isinstance(each, int) and not isinstance(each, bool)}
    texts = [each for each in values if isinstance(each, str)]
    if len(texts) + sum(isinstance(each, int) and not isinstance(each, bool) for each in values) < len(values):
        raise SettingError("A vocabulary is texts, or token numbers; found something else among them.")
    return texts, numbers


def _told_ids(model: Any, size: int) -> set[int]:
    """Return the words that a model's configuration, or its settings of generation, name by their numbers."""
    found: set[int] = set()
    for _, values in _described(model, size):
        found.update(values)
    return found


def _described(model: Any, size: int) -> Iterable[tuple[tuple[Any, tuple[str, ...]], list[int]]]:
    """Yield where numbers of words stand (which settings, and the path in them), and the numbers."""
    for settings in (model.config, getattr(model, "generation_config", None)):
        for path, fields in nodes(settings.to_dict()) if settings is not None else ():
            for name, value in fields.items():
                numbers = value if isinstance(value, list | tuple) else [value]
                if _OF_A_TOKEN.search(name) and numbers and all(type(each) is int for each in numbers):
                    named = [number for number in numbers if 0 <= number < size]
                    if named:
                        yield (settings, (*path, name)), named


def _apply(model: Any, vocabulary: Vocabulary) -> None:
    """Make a model's words fewer, and prove it; undo it where it computes something else."""
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
    before = _outputs(model, inputs)
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
        _check(model, before, _outputs(model, drawn.to(model.device)), kept, size)
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
    """Return the parameters and buffers of a model, shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _smaller(model: Any, size: int, left: int, renumbered: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, int]]:
    """Return what the fields of a configuration become that count words, and those that name some.

    It is found by trying, field by field, what a field changes: the word embeddings have to be among it.

    Returns:
        The change, and the tensors that follow it: name -> the dimension that words lie along.
    """
    old = {name: tuple(value.shape) for name, value in _tensors(_built(model, {})).items()}
    words = next(name for name, value in _tensors(model).items() if value is model.get_input_embeddings().weight)
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
        f"{type(model.config).__name__} has no number that says of {type(model).__name__} how many words there are "
        f"({size}), so that fewer of them could be loaded again."
    )


def _along(old: Sequence[int], new: Sequence[int], size: int, left: int) -> int | None:
    """Return the dimension in which a shape went from `size` to `left`; None where it did anything else."""
    dims = [dim for dim, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
    return dims[0] if len(old) == len(new) and len(dims) == 1 and (old[dims[0]], new[dims[0]]) == (size, left) else None


def _built(model: Any, change: Mapping[Any, Any]) -> nn.Module:
    """Return the dense model that a changed configuration builds, without memory."""
    kind: Any = true_class(model)
    settings = changed(without_record(model.config).to_dict(), change)
    return outline(lambda: kind(type(model.config).from_dict(settings)))


def _differing(model: nn.Module, old: nn.Module, new: nn.Module) -> Iterable[tuple[nn.Module, str, Any]]:
    """Yield what modules keep of the number of words, or of words: what two configurations build differs in it."""
    fresh = dict(new.named_modules())
    mine = dict(model.named_modules())
    for path, module in old.named_modules():
        if path in mine and path in fresh:
            for name, value in vars(module).items():
                other = vars(fresh[path]).get(name)
                if type(value) is int and type(other) is int and value != other:
                    yield mine[path], name, other


def _outputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    try:
        with evaluating(model):
            return dict(tensors_of(call(model, {"input_ids": ids, **more})))
    except Exception as error:  # the model's own
        raise LayoutError(
            f"{type(model).__name__} does not run on words alone ({type(error).__name__}: {error}), so that nothing "
            "could be proved of fewer words."
        ) from error


def _check(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], kept: Tensor, size: int
) -> None:
    """Raise unless outputs are what they were, without the scores of the words that went."""
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
                f"With fewer words {type(model).__name__} would compute another {name}. It was left as it was; please "
                "report it."
            )
