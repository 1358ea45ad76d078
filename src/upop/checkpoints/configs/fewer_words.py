"""Models with fewer words, those of upop among them: BLIP's tables are a tenth of its parameters and more.

Models of transformers are changed by `reduce_vocabulary`. One of ours is built anew with fewer words, filled with the
rows that stay, and compared with what it was on texts of these words.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from upop.checkpoints.configs.vocabulary import Vocabulary, chosen_words, note_words, reduce_vocabulary
from upop.checkpoints.fitting.carried import VOCABULARY, preparation_of, set_preparation
from upop.checkpoints.fitting.fit import fit
from upop.checkpoints.fitting.meta import outline
from upop.errors import SettingError, VerificationError
from upop.libraries import is_pretrained
from upop.models import MODELS, kind_of
from upop.models.blip import BlipConfig
from upop.pruning.carried import plan_of, set_plan
from upop.pruning.costs import call, evaluating
from upop.pruning.verify import tensors_of
from upop.tokens.cross import give_held
from upop.tokens.encoders import merge_again, removed_tokens

_CLOSE = 1e-4
"""What outputs may differ by, as a share of the largest: fewer columns are summed in another order."""


def with_fewer_words(model: nn.Module, vocabulary: Any, tokenizer: Any) -> tuple[nn.Module, Vocabulary]:
    """Return a model without the words that a task never uses, and what stayed; it may be the same one, changed.

    Args:
        model: one of transformers, or a BLIP of upop, dense or compressed.
        vocabulary: as for `upop.reduce_vocabulary`.
        tokenizer: the model's own.

    Raises:
        SettingError: it is another library's, or the vocabulary cannot be used.
        VerificationError: it would compute something else.
    """
    if is_pretrained(model):
        return model, reduce_vocabulary(cast(Any, model), vocabulary, tokenizer)
    config: Any = getattr(model, "config", None)
    if not isinstance(config, BlipConfig):
        raise SettingError(
            f"A vocabulary was given for a {type(model).__name__}. Words can be dropped of models of transformers, and "
            "of upop's BLIP."
        )
    size = config.vocab_size
    found = chosen_words(vocabulary, tokenizer, size, (0, size - 2, size - 1))  # padding, [DEC] and [ENC]
    smaller = _of_words(model, config.model_copy(update={"vocab_size": len(found.kept)}), found)
    _check(model, smaller, found)
    note_words(smaller, found, getattr(model, VOCABULARY, None))
    return smaller, found


def _of_words(model: nn.Module, config: BlipConfig, found: Vocabulary) -> nn.Module:
    """Return a model of ours with another vocabulary, and the rows of the words that stay."""
    built = MODELS[str(kind_of(model))][0]
    before, after = (outline(lambda to=each: built(to)).state_dict() for each in (model.config, config))  # type: ignore[misc]
    kept = torch.tensor(found.kept)
    state = model.state_dict()
    for name, old in before.items():
        changed = [dim for dim, pair in enumerate(zip(old.shape, after[name].shape, strict=True)) if pair[0] != pair[1]]
        for dim in changed:
            state[name] = state[name].index_select(dim, kept.to(state[name].device))
    smaller = fit(give_held(built(config), state), state, type(model).__name__, lambda _group: False).eval()
    set_plan(smaller, plan_of(model))
    set_preparation(smaller, preparation_of(model))
    removed = removed_tokens(model)
    return smaller if removed is None else merge_again(smaller, removed)


def _check(model: nn.Module, smaller: nn.Module, found: Vocabulary) -> None:
    """Raise unless a model computes on words that stay what it did, without the scores of the others."""
    kept = torch.tensor(found.kept)
    inputs: dict[str, Tensor] = cast(Any, model).dummy_inputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = {name: torch.randint(len(kept), each.shape) for name, each in inputs.items() if name.endswith("_ids")}
    with evaluating(model), evaluating(smaller):
        before = dict(tensors_of(call(model, {**inputs, **{name: kept[each] for name, each in drawn.items()}})))
        after = dict(tensors_of(call(smaller, {**inputs, **drawn})))
    for name, old in before.items():
        wanted = old.index_select(-1, kept) if old.dim() and old.shape[-1] == found.size else old
        new = after[name]
        if wanted.shape != new.shape or not bool((wanted - new).abs().max() <= _CLOSE * wanted.abs().max()):
            raise VerificationError(
                f"With fewer words {type(model).__name__} would compute another {name or 'output'}. Nothing was "
                "written; please report it."
            )
