"""Tokenizes texts for CLIP: token ids between a begin and an end token, padded to one length.

CLIP takes a text's feature at the end token, the last word of the vocabulary. So the tokenizer's last two words must be
begin and end tokens: those of CLIP's byte-pair encoding (<|startoftext|>, <|endoftext|>), or [DEC] and [ENC] of a BERT
vocabulary, as in the generated data.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from torch import Tensor
from transformers import CLIPTokenizer as LibraryTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from upop.data.retrieval import RetrievalCollator
from upop.data.tokenizer import load_tokenizer
from upop.errors import DataError
from upop.reading import read_bytes, read_object

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PADDING = 0
"""As published; tokens after the end token have no effect."""

_WHOLE, _ADVICE = "tokenizer.json", "Fetch or write it again."
_BYTE_PAIRS = ("vocab.json", "merges.txt")
_MERGES = 49152 - 256 - 2
"""Number of merges of the list that OpenAI uses."""
_LARGEST_MERGES = 2**24
_HUB_TIMEOUT = 10.0


@dataclass(frozen=True)
class ClipTokenizer:
    """Tokenizes texts between a begin and an end token, the last two words of the vocabulary.

    Attributes:
        library: a tokenizer of transformers.
        begin: id of the begin token.
        end: id of the end token, the highest of all.
    """

    library: Any
    begin: int
    end: int

    def __len__(self) -> int:
        """The number of words."""
        return self.end + 1

    def __call__(self, texts: Sequence[str], length: int) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, int64 [texts, tokens], padded to the longest text.

        Texts are truncated to `length` tokens, but keep the end token.
        """
        # transformers' CLIPTokenizer adds its special tokens by name, which a BERT vocabulary lacks.
        rows = self.library(list(texts), add_special_tokens=False)["input_ids"]
        rows = [[self.begin, *row[: length - 2], self.end] for row in rows]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), PADDING)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class ClipCollator(RetrievalCollator):
    """Collates items for CLIP; `tokenizer` is a `ClipTokenizer`."""

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask, [texts, tokens]; CLIP does not need the mask."""
        return cast(ClipTokenizer, self.tokenizer)(texts, self.max_length)


def load_clip_tokenizer(path_or_name: str | Path) -> ClipTokenizer:
    """Load a tokenizer from disk, or by its name on the hub.

    On disk it is a folder with CLIP's vocab.json and merges.txt, or with tokenizer.json; OpenAI's own file
    (bpe_simple_vocab_16e6.txt.gz); or a folder with a BERT vocabulary.

    Raises:
        DataError: there is none, or its last two words are not begin and end tokens.
    """
    name = os.fspath(path_or_name)
    folder = Path(name)
    if all((folder / file).is_file() for file in _BYTE_PAIRS):
        return _byte_pairs(str(folder), local=True)
    if folder.name.endswith(".txt.gz") and folder.is_file():
        return _merge_list(folder)
    if _model_type(folder) not in (None, "WordPiece"):
        return _whole_file(folder)
    if folder.is_dir():
        return _bert(load_tokenizer(folder), name)
    if isinstance(path_or_name, Path) or folder.exists() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise DataError(
            f"The tokenizer folder {name!r} does not exist. Give a folder with {' and '.join(_BYTE_PAIRS)}, {_WHOLE} "
            "or vocab.txt, or a name on the hub, such as openai/clip-vit-large-patch14."
        )
    return _from_hub(name)


def _from_hub(name: str) -> ClipTokenizer:
    try:
        return _byte_pairs(name, local=True)  # a copy in the cache needs no network
    except DataError:
        pass
    try:
        # Without a network, loading retries every file for minutes; one request fails fast.
        huggingface_hub.model_info(name, timeout=_HUB_TIMEOUT)
    except Exception as error:  # no network, no such name, no permission
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"The tokenizer {name!r} is neither a folder nor available on the hub: {first.rstrip('.')}. "
            f"Check the name and the network, or give a folder with {' and '.join(_BYTE_PAIRS)}."
        ) from error
    return _byte_pairs(name, local=False)


def _byte_pairs(name: str, *, local: bool) -> ClipTokenizer:
    try:
        library = LibraryTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # the parsers raise errors of many types
        raise DataError(f"The CLIP tokenizer in {name!r} cannot be read: {error}.") from error
    return _checked(library, BEGIN, END, name)


def _model_type(folder: Path) -> str | None:
    """Return the model type in a folder's tokenizer.json; None without that file."""
    if not (folder / _WHOLE).is_file():
        return None
    model = read_object(folder / _WHOLE, DataError, _ADVICE).get("model")
    return str(model.get("type")) if isinstance(model, dict) else "unknown"


def _whole_file(folder: Path) -> ClipTokenizer:
    """Read any tokenizer.json; tokenizer_config.json may name its begin and end tokens."""
    config = folder / "tokenizer_config.json"
    names = read_object(config, DataError, _ADVICE) if config.is_file() else {}
    try:
        library = PreTrainedTokenizerFast(tokenizer_file=str(folder / _WHOLE))
    except Exception as error:  # the parser raises errors of its own
        raise DataError(f"The tokenizer {folder / _WHOLE} cannot be read: {error}. {_ADVICE}") from error
    begin, end = (_word(names.get(name), usual) for name, usual in (("bos_token", BEGIN), ("eos_token", END)))
    return _checked(library, begin, end, str(folder))


def _word(value: Any, default: str) -> str:
    """Return a special token of tokenizer_config.json, which is a string or an object."""
    word = value.get("content") if isinstance(value, dict) else value
    return word if isinstance(word, str) else default


def _merge_list(file: Path) -> ClipTokenizer:
    """Read OpenAI's list of merges, which transformers does not read.

    The vocabulary has bytes, bytes with </w>, merges, and two special tokens.
    """
    try:
        # Limited, because gzip skips trailing padding byte by byte, which takes hours for gigabytes.
        with gzip.open(io.BytesIO(read_bytes(file, _LARGEST_MERGES))) as packed:
            content = packed.read(_LARGEST_MERGES + 1)  # limited, because a few bytes can unpack to gigabytes
        if len(content) > _LARGEST_MERGES:
            raise ValueError(f"it holds more than {_LARGEST_MERGES} bytes")
        merges = [tuple(line.split()) for line in content.decode().split("\n")[1 : 1 + _MERGES]]
        if not merges[-1]:  # a shorter list ends in an empty line
            merges.pop()
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise DataError(f"The list of merges {file} cannot be read: {error}. Fetch it again.") from error
    if bad := [merge for merge in merges if len(merge) != 2]:
        raise DataError(f"{file} is not a list of merges of two tokens: it holds {' '.join(bad[0])!r}.")
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    numbers = {word: number for number, word in enumerate(words)}
    try:
        library = LibraryTokenizer(vocab=numbers, merges=cast(Any, merges))
    except Exception as error:  # the library raises plain Exceptions
        raise DataError(f"{file} is not a valid list of merges: {error}. Fetch it again.") from error
    return _checked(library, BEGIN, END, str(file))


def _bert(library: Any, name: str) -> ClipTokenizer:
    return _checked(library, "[DEC]", "[ENC]", name)


def _checked(library: Any, begin: str, end: str, name: str) -> ClipTokenizer:
    words = library.get_vocab()
    found = (words.get(begin), words.get(end))
    if found != (len(words) - 2, len(words) - 1):
        raise DataError(
            f"The tokenizer {name!r} has {len(words)} words, and {begin} and {end} must be the last two; their ids are "
            f"{found[0]} and {found[1]}. Fetch the files of openai/clip-vit-large-patch14, or give another tokenizer."
        )
    return ClipTokenizer(library, found[0], found[1])
