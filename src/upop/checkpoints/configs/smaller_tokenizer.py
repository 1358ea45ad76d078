"""Reduces fast tokenizers to fewer tokens: the same texts become the same pieces, with new ids.

A text is split into the same pieces if these pieces and all that they are merged from are kept: longest matches
(WordPiece), merges in their order (BPE) and best paths (Unigram) then only lose alternatives.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from upop.errors import SettingError, VerificationError
from upop.pruning.json_text import parse_json
from upop.values import shortened

_ALPHABET = 512
"""The alphabet (pieces that are not merged from others) is kept whole up to this size: bytes spell every text."""


def used_ids(tokenizer: Any, texts: Sequence[str]) -> set[int]:
    """Return the ids of the tokens of some texts, special tokens included."""
    found: set[int] = set()
    for ids in tokenizer(list(texts))["input_ids"] if texts else ():
        found.update(ids)
    return found


def needed_ids(tokenizer: Any, used: Iterable[int]) -> set[int]:
    """Return the ids that must be kept for some tokens to work: these, special ones, and the pieces they are made of.

    Args:
        tokenizer: a fast tokenizer of transformers.
        used: token ids.
    """
    described = _content(tokenizer)
    vocabulary = _vocabulary(described["model"])
    ids = {
        *used,
        *tokenizer.all_special_ids,
        *(each["id"] for each in described["added_tokens"] if each.get("special")),
    }
    names = {number: piece for piece, number in vocabulary.items()}
    pieces = {names[number] for number in ids if number in names}
    pieces |= _spelling(described["model"], vocabulary, pieces)
    return ids | {vocabulary[piece] for piece in pieces}


def smaller_tokenizer(tokenizer: Any, kept: Sequence[int], texts: Sequence[str] = ()) -> Any:
    """Return a copy of a tokenizer with some of its tokens, renumbered in their order.

    Args:
        tokenizer: a fast tokenizer of transformers.
        kept: token ids, ascending, including `needed_ids`.
        texts: texts whose tokens must not change, for verification.

    Raises:
        SettingError: it is not a fast tokenizer.
        VerificationError: a text is split into other tokens; the message names it.
    """
    from tokenizers import Tokenizer

    new = {old: place for place, old in enumerate(kept)}
    described = _content(tokenizer)
    model = described["model"]
    vocabulary = _vocabulary(model)
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {piece: new[number] for piece, number in vocabulary.items() if number in new}
    if model.get("merges"):
        left = {*model["vocab"]}
        model["merges"] = [each for each in model["merges"] if {*_parts(each), _merged(model, each)} <= left]
    described["added_tokens"] = [
        {**each, "id": new[each["id"]]} for each in described["added_tokens"] if each["id"] in new
    ]
    described["post_processor"] = _renumbered(described.get("post_processor"), new)
    if described.get("padding") is not None:
        described["padding"]["pad_id"] = new.get(described["padding"]["pad_id"], 0)
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(described))
    for before, after in zip(texts, smaller(list(texts))["input_ids"] if texts else (), strict=True):
        expected = [new.get(number) for number in tokenizer(before)["input_ids"]]
        if expected != after:
            raise VerificationError(
                f"With fewer tokens, {type(tokenizer).__name__} would split {shortened(before)} differently. Nothing "
                "was changed; please report this."
            )
    return smaller


def is_fast(tokenizer: Any) -> bool:
    """Whether a tokenizer is a fast one, which can be reduced."""
    held = getattr(tokenizer, "backend_tokenizer", None)
    return held is not None and hasattr(held, "to_str")


def _content(tokenizer: Any) -> dict[str, Any]:
    if not is_fast(tokenizer):
        raise SettingError(
            f"A {type(tokenizer).__name__} cannot be reduced. Give a fast tokenizer of transformers; or give token "
            "ids, and map what your tokenizer returns with `Vocabulary.encode`."
        )
    described: dict[str, Any] = parse_json(tokenizer.backend_tokenizer.to_str())
    return described


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Return piece -> id."""
    held = model["vocab"]
    return {entry[0]: number for number, entry in enumerate(held)} if isinstance(held, list) else dict(held)


def _spelling(model: Mapping[str, Any], vocabulary: Mapping[str, int], pieces: set[str]) -> set[str]:
    """Return the pieces that others are made of, and those that spell any other text."""
    found: set[str] = set()
    prefix = model.get("continuing_subword_prefix") or ""
    if model.get("merges"):
        made: dict[str, list[tuple[str, str]]] = {}
        for each in model["merges"]:
            made.setdefault(_merged(model, each), []).append(_parts(each))
        waiting = list(pieces)
        while waiting:
            for pair in made.get(waiting.pop(), ()):
                waiting += [part for part in pair if part not in found]
                found.update(pair)
        alphabet = {piece for piece in vocabulary if piece not in made}
        found |= alphabet if len(alphabet) <= _ALPHABET else set()
    else:
        letters = {letter for piece in pieces for letter in piece.removeprefix(prefix)}
        found |= {start + letter for letter in letters for start in {"", prefix}}
    if model.get("byte_fallback"):
        found |= {f"<0x{byte:02X}>" for byte in range(256)}
    unknown = model.get("unk_token")
    return {piece for piece in {*found, *([unknown] if isinstance(unknown, str) else [])} if piece in vocabulary}


def _parts(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _merged(model: Mapping[str, Any], merge: Any) -> str:
    first, second = _parts(merge)
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor with the new ids of the special tokens that it inserts."""
    if isinstance(value, dict):
        changed = {name: _renumbered(each, new) for name, each in value.items()}
        if isinstance(value.get("ids"), list):
            changed["ids"] = [new[number] for number in value["ids"]]
        return changed
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
            return [value[0], new[value[1]]]
        return [_renumbered(each, new) for each in value]
    return value
