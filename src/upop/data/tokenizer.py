"""Loads the BERT tokenizer of the published models: WordPiece, plus [DEC] (bos) and [ENC]."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import BertTokenizer

from upop.errors import DataError, nearest
from upop.values import shortened

BEGIN = "[DEC]"
"""First token of generated text; the tokenizer's bos token."""
ENCODE = "[ENC]"
"""First token of text that is encoded together with an image."""

_FILES = ("vocab.txt", "tokenizer.json")
_NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_HUB_TIMEOUT = 10.0


def load_tokenizer(path_or_name: str | Path) -> Any:
    """Load a BERT tokenizer from a folder with vocab.txt or tokenizer.json, or by its name on the hub.

    [DEC] and [ENC] are appended unless the vocabulary has them (bert-base-uncased: 30,522 words become 30,524). A name
    with a path separator, or that starts with a dot, is always a local path.

    Returns:
        A BertTokenizer of transformers; `enc_token_id` gives its id of [ENC].

    Raises:
        DataError: there is no such folder or name, or it holds no BERT vocabulary.
    """
    name = os.fspath(path_or_name)
    folder = Path(name)
    if folder.is_dir():
        tokenizer = _from_folder(folder)
    elif folder.exists():
        raise DataError(f"The tokenizer {name!r} is a file. Give the folder that holds {' or '.join(_FILES)}.")
    elif isinstance(path_or_name, Path) or name.startswith((".", "~")) or "/" in name or os.sep in name:
        raise DataError(_no_folder(name, folder))
    else:
        tokenizer = _from_hub(name)
    tokenizer.add_special_tokens({"bos_token": BEGIN})
    tokenizer.add_special_tokens({"additional_special_tokens": [ENCODE]})
    return tokenizer


def enc_token_id(tokenizer: Any) -> int:
    """Return the id of [ENC], the first token of text that is encoded together with an image."""
    return int(tokenizer.convert_tokens_to_ids(ENCODE))


def _no_folder(name: str, folder: Path) -> str:
    hint = ""
    if folder.parent.is_dir():
        hint = nearest(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()])
    return (
        f"The tokenizer folder {name!r} does not exist{hint}. "
        f"Give a folder with {' or '.join(_FILES)}, or a name on the hub, such as bert-base-uncased."
    )


def _from_folder(folder: Path) -> Any:
    # Without this check, transformers silently makes an empty vocabulary.
    if not any((folder / file).is_file() for file in _FILES):
        raise DataError(f"The tokenizer folder {str(folder)!r} holds neither {' nor '.join(_FILES)}.")
    try:
        tokenizer = BertTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the parsers raise errors of many types
        raise DataError(f"The tokenizer in {str(folder)!r} cannot be read: {_first_line(error)}.") from error
    if missing := _missing(tokenizer):
        raise DataError(
            f"The tokenizer in {str(folder)!r} is not a BERT vocabulary: it lacks {', '.join(missing)}. "
            "Fetch the vocab.txt of bert-base-uncased, or give another folder."
        )
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise DataError(
            f"The tokenizer in {str(folder)!r} cannot be read: model_max_length must be a number, not "
            f"{shortened(longest)}. Correct its tokenizer_config.json."
        )
    return tokenizer


def _missing(tokenizer: Any) -> list[str]:
    """Return the special tokens that the vocabulary lacks; transformers would add them under new ids."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return [token for token in _NEEDED if token not in vocabulary]


def _from_hub(name: str) -> Any:
    try:
        # A copy in the cache needs no network.
        tokenizer = BertTokenizer.from_pretrained(name, local_files_only=True)
        # Without files in the cache, transformers may return a vocabulary of its five special tokens.
        if not _missing(tokenizer) and len(tokenizer) > 5:
            return tokenizer
    except Exception:  # not in the cache, or incomplete: ask the hub
        pass
    try:
        # Without a network, loading retries every file for minutes; one request fails fast.
        huggingface_hub.model_info(name, timeout=_HUB_TIMEOUT)
        return BertTokenizer.from_pretrained(name)
    except Exception as error:  # no network, no such name, no permission, a broken download
        raise DataError(
            f"The tokenizer {name!r} is neither a folder nor available on the hub: {_first_line(error)}. "
            "Check the name and the network, or give a folder with vocab.txt."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
