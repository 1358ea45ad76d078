"""Processors of transformers and open_clip models, which lie beside the weights, behind one interface.

A task uses `images`, `texts` and `save_pretrained` alone. Processors are pickled to the workers of data loaders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from upop.checkpoints.files.config_json import is_transformers_folder, read_config
from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.errors import CheckpointError, UPopError
from upop.libraries import naming_missing
from upop.reading import read_object

Padding = Literal["auto", "longest", "max_length"]

_TEXTS = "open_clip_tokenizer.json"
_TO_THE_END = ("siglip", "siglip2")
"""Model types that read a text's features at the last position, so that texts are always padded to the full length."""
_LONGEST = 512  # if neither tokenizer nor configuration states a length


class InputProcessor(Protocol):
    """Makes a model's inputs from images and texts."""

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the inputs for images, [batch, ...] each, by the names of the model's arguments."""
        ...

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the inputs for texts, [batch, tokens] each, by the names of the model's arguments."""
        ...

    def save_pretrained(self, folder: Path) -> Any:
        """Write the processor beside a model's weights."""
        ...


def processor_in(path: Path, padding: Padding = "auto", length: int | None = None) -> InputProcessor:
    """Return the processor of the model in a folder.

    Args:
        path: a folder of transformers or open_clip, or of upop with a model of either.
        padding: pad texts to the longest of a batch, or always to the model's length. "auto" pads to the model's length
            without an attention mask, and for models that read texts at the last position.
        length: largest number of tokens of a text; by default that of the folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.library == "open_clip":
        return OpenClipProcessor(checkpoint, length)
    return TransformersProcessor(open_processor(path), path, padding, length)


def open_processor(path: Path) -> Any:
    """Return the processor of a transformers model: for images and texts, or for either alone.

    Nothing is downloaded, and no code in the folder runs.

    Args:
        path: the folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    with naming_missing():
        from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

        from upop.checkpoints.libraries.outside import sealed
    reasons = []
    for kind in (AutoProcessor, AutoImageProcessor, AutoTokenizer):
        try:
            with sealed():
                return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except UPopError:
            raise
        except Exception as error:  # each class reports missing files in its own way
            reasons.append(" ".join(str(error).split())[:200])
    raise CheckpointError(
        f"{path} holds no processor that transformers can read ({reasons[0]}). Write it beside the weights: "
        "processor.save_pretrained(folder)."
    )


class TransformersProcessor:
    """The processor of a transformers model.

    Args:
        processor: the processor of images and texts, or of either alone.
        path: its folder, whose config.json states the length of texts.
        padding: as for `processor_in`.
        length: as for `processor_in`.
    """

    def __init__(self, processor: Any, path: Path, padding: Padding = "auto", length: int | None = None) -> None:
        self.library = processor
        self._path = path
        self._image = getattr(processor, "image_processor", None if hasattr(processor, "pad_token") else processor)
        self._text = getattr(processor, "tokenizer", processor if hasattr(processor, "pad_token") else None)
        config = read_config(path) if is_transformers_folder(path) else {}
        text = config.get("text_config") or config
        limits = [getattr(self._text, "model_max_length", None), text.get("max_position_embeddings"), _LONGEST]
        self.length = length or min(limit for limit in limits if isinstance(limit, int) and limit > 0)
        masked = "attention_mask" in getattr(self._text, "model_input_names", ())
        if padding == "auto":
            padding = "longest" if masked and config.get("model_type") not in _TO_THE_END else "max_length"
        self.padding = padding

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Process RGB images."""
        if self._image is None:
            raise CheckpointError(f"{self._path} holds no image processor. Write one beside the weights.")
        return dict(self._image(images=list(images), return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts: input_ids, and all else that the tokenizer returns, [batch, tokens]."""
        if self._text is None:
            raise CheckpointError(f"{self._path} holds no tokenizer. Write one beside the weights.")
        return dict(
            self._text(list(texts), padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt")
        )

    def save_pretrained(self, folder: Path) -> None:
        """Write the processor as transformers does."""
        self.library.save_pretrained(folder)


class OpenClipProcessor:
    """The transforms and the tokenizer of an open_clip model.

    Args:
        checkpoint: a folder of open_clip, or of upop with an open_clip model.
        length: largest number of tokens of a text; by default that of the folder.

    Raises:
        CheckpointError: the preparation that it describes cannot be built.
    """

    def __init__(self, checkpoint: Checkpoint, length: int | None = None) -> None:
        with naming_missing():
            from open_clip import tokenizer
            from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
        path, described = checkpoint.path, checkpoint.config
        images: Mapping[str, Any] = described.get("preprocess") or {}
        text = dict(described.get("arguments", {}).get("text_cfg", {}))
        if checkpoint.kind == "upop" and (path / _TEXTS).is_file():
            text |= read_object(path / _TEXTS, CheckpointError, "Write it again.")
        self._texts = {name: text[name] for name in _OF_TEXTS if name in text}
        self._texts["context_length"] = length or text.get("context_length") or 77
        try:
            kept = merge_preprocess_dict(PreprocessCfg(), dict(images))
            self._transform = image_transform_v2(PreprocessCfg(**kept), is_train=False)
            if self._texts.get("hf_tokenizer_name"):
                self._tokenizer: Any = tokenizer.HFTokenizer(
                    str(path),
                    context_length=self._texts["context_length"],
                    tokenizer_mode=self._texts.get("tokenizer_mode"),
                    **self._texts.get("tokenizer_kwargs", {}),
                    local_files_only=True,
                )
            else:
                self._tokenizer = tokenizer.SimpleTokenizer(
                    context_length=self._texts["context_length"], **self._texts.get("tokenizer_kwargs", {})
                )
        except Exception as error:  # whatever open_clip meets
            raise CheckpointError(
                f"open_clip cannot build the preparation of images and texts in {checkpoint.description_file}: "
                f"{error}. Is the tokenizer in the folder, and open_clip_torch new enough?"
            ) from error

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return images [batch, 3, height, width], as `image`."""
        return {"image": torch.stack([self._transform(image) for image in images])}

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return tokens [batch, tokens], as `text`."""
        return {"text": self._tokenizer(list(texts))}

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer; the preparation of images is in the description of the model."""
        (Path(folder) / _TEXTS).write_text(json.dumps(self._texts, indent=1))
        if self._texts.get("hf_tokenizer_name"):
            self._tokenizer.save_pretrained(folder)


_OF_TEXTS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "context_length")
