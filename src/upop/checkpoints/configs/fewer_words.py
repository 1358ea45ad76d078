"""Reduces the vocabulary of upop's BLIP models, whose embeddings are a tenth of the parameters or more.

Transformers models are changed by `reduce_vocabulary`. A BLIP model is rebuilt with a smaller vocabulary, filled with
the kept rows, and verified on texts of the kept tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from upop.checkpoints.configs.vocabulary import Vocabulary, chosen_words, note_words, reduce_vocabulary
from upop.checkpoints.fitting.carried import VOCABULARY, preparation_of, set_preparation
from upop.checkpoints.fitting.fit import fit
from upop.checkpoints.fitting.meta import meta_model
from upop.errors import SettingError, VerificationError
from upop.libraries import is_pretrained
from upop.models import MODELS, kind_of
from upop.models.blip import BlipConfig
from upop.pruning.carried import plan_of, set_plan
from upop.pruning.costs import call, count_parameters, evaluating
from upop.pruning.verify import tensors_of
from upop.tokens.cross import give_held
from upop.tokens.encoders import merge_again, removed_tokens

_CLOSE = 1e-4
"""Largest difference relative to the largest element: fewer columns are summed in another order."""


def with_fewer_words(model: nn.Module, vocabulary: Any, tokenizer: Any) -> tuple[nn.Module, Vocabulary]:
    """Return a model without the tokens that a task never uses, and the kept tokens; transformers models are changed.

    Args:
        model: a transformers model, or a BLIP model of upop, dense or compressed.
        vocabulary: as for `upop.reduce_vocabulary`.
        tokenizer: the model's tokenizer.

    Raises:
        SettingError: the model is of another library, or the vocabulary cannot be used.
        VerificationError: the outputs would differ.
    """
    if is_pretrained(model):
        return model, reduce_vocabulary(cast(Any, model), vocabulary, tokenizer)
    config: Any = getattr(model, "config", None)
    if not isinstance(config, BlipConfig):
        raise SettingError(
            f"A vocabulary was given for a {type(model).__name__}. Only transformers models and upop's BLIP models "
            "support a smaller vocabulary."
        )
    size = config.vocab_size
    found = chosen_words(vocabulary, tokenizer, size, (0, size - 2, size - 1))  # padding, [DEC] and [ENC]
    smaller = _of_words(model, config.model_copy(update={"vocab_size": len(found.kept)}), found)
    _check(model, smaller, found)
    note_words(smaller, found, getattr(model, VOCABULARY, None), count_parameters(model))
    return smaller, found


def _of_words(model: nn.Module, config: BlipConfig, found: Vocabulary) -> nn.Module:
    """Return a model of upop with a smaller vocabulary, and the rows of the kept tokens."""
    built = MODELS[str(kind_of(model))][0]
    before, after = (meta_model(lambda to=each: built(to)).state_dict() for each in (model.config, config))  # type: ignore[misc]
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
    """Raise unless the outputs on kept tokens are the same, without the logits of the removed ones."""
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
                f"With a smaller vocabulary {type(model).__name__} would compute another {name or 'output'}. Nothing "
                "was written; please report this."
            )
