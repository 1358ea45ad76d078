"""The setting `vocabulary`: a compression starts from a model without the words that its task never uses."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from upop.checkpoints import save
from upop.checkpoints.configs.fewer_words import with_fewer_words
from upop.checkpoints.configs.vocabulary import read_vocabulary
from upop.checkpoints.files.hub import local_path
from upop.checkpoints.fitting.carried import set_preparation
from upop.errors import SettingError
from upop.pruning import count_parameters
from upop.pruning.beforehand import lost_parameters, note_lost
from upop.runs.inputs import resolved, sample
from upop.runs.task import Task
from upop.settings import RunSettings

FOLDER = "vocabulary"
"""The subfolder of a run with the model that it starts from."""

_LOOKED_AT = 64
"""About as many training samples are searched for removed words."""
_NAMED = 5
"""As many removed words are named."""

S = TypeVar("S", bound=RunSettings)


@dataclass(frozen=True)
class FewerWords:
    """A dense model without the words that a task never uses.

    Attributes:
        folder: where it lies, with its tokenizer.
        lost: how many parameters it lost.
        note: what was removed, in words.
    """

    folder: str
    lost: int
    note: str

    def applied(self, settings: S) -> S:
        """Return the settings of a run that starts from this model."""
        named = {"tokenizer": self.folder} if "tokenizer" in type(settings).model_fields else {}
        return settings.model_copy(update={"pretrained": self.folder, **named})

    def marked(self, model: nn.Module) -> nn.Module:
        """Return the loaded model, whose removed words count towards a target of parameters."""
        note_lost(model, self.lost, next(each for each in model.parameters() if each.is_floating_point()))
        return model


def without_words(task: Task[Any], settings: RunSettings, folder: Path) -> FewerWords:
    """Write the model in `pretrained` without the words that are not in the file `vocabulary`.

    The tokens of the first training sample are kept as well, since users' texts lack those of a chat template or a
    task's prompt.

    Args:
        task: of the model.
        settings: of the run.
        folder: to write to; an older one of upop is replaced.

    Raises:
        SettingError: the task has no words, or the vocabulary cannot be used.
        UPopError: the model, the data or the folder is not usable.
    """
    assert settings.vocabulary is not None
    texts = read_vocabulary(settings.vocabulary)
    if not settings.pretrained:
        raise SettingError("A vocabulary was given, but no model to reduce. Set pretrained.")
    source = local_path(settings.pretrained)
    settings = settings if task.model_prepares else resolved(task, settings, source)[0]
    model = task.load(source, settings)
    held = task.tokenizer(settings)
    if held is None:
        raise SettingError(f"vocabulary={settings.vocabulary} was given, but {task.name} has no text. Leave it out.")
    processor = copy.deepcopy(getattr(held, "library", held))
    data: Any = task.dataset(settings, "train")
    collate = task.collate(settings)

    def used(number: int) -> set[int]:
        batch = collate([data[number]])
        ids = [each for name, each in batch.items() if name.endswith("input_ids") and isinstance(each, Tensor)]
        return {token for each in ids for token in each.unique().tolist()}

    before = count_parameters(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    held_tokenizer = copy.deepcopy(tokenizer)
    smaller, found = with_fewer_words(model, [*texts, *sorted(used(0))], tokenizer)
    looked_at = range(0, len(data), max(1, len(data) // _LOOKED_AT))
    missing = [used(number) - set(found.kept) for number in looked_at]
    if processor is tokenizer:
        processor = found.tokenizer
    else:
        processor.tokenizer = found.tokenizer
    if not task.model_prepares:
        set_preparation(smaller, sample(task, settings))
    save(smaller, folder, tokenizer=processor)
    after = count_parameters(smaller)
    note = f"vocabulary: {len(found.kept):,} of {found.size:,} words stay, {after:,} of {before:,} parameters"
    if any(missing):
        words = held_tokenizer.convert_ids_to_tokens(sorted(set().union(*missing))[:_NAMED])
        note += (
            f"; {sum(map(bool, missing))} of {len(missing)} training samples that were looked at have words that are "
            f"removed ({', '.join(words)}): add their texts to {settings.vocabulary}"
        )
    return FewerWords(str(folder), before - after, note)


def parameters_before(model: nn.Module) -> int:
    """Return the number of parameters of a dense model, with those of the words that it lost."""
    return count_parameters(model) + lost_parameters(model)
