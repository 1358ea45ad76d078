"""Image captioning (COCO) with BLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from upop.data.caption import CAPTION_TOKENS, CaptionCollator, CaptionEvalDataset, CaptionTrainDataset
from upop.data.transforms import eval_transform, train_transform
from upop.errors import SettingError
from upop.examples import Album, Answer, Example
from upop.metrics.captions import caption_scores, deciding_metric
from upop.models.blip import BlipConfig
from upop.models.caption import PAD, BlipCaption, CaptionConfig, caption_loss
from upop.runs.examples import untransformed
from upop.runs.task import Batch
from upop.settings import RunSettings
from upop.tasks.blip import BlipSettings, BlipTask, blank_images, blip_tokenizer, dummy_tokens, with_cross_loss

_EXAMPLE_TOKENS = 15  # the caption length that the published multiply-adds were counted with
_SAMPLING_PENALTY = 1.1


class CaptionSettings(BlipSettings):
    """Settings of configs/caption_coco.yaml; the defaults are the published ones."""

    recorded: ClassVar[tuple[str, ...]] = (
        *BlipSettings.recorded,
        *("prompt", "max_length", "min_length", "num_beams", "sample", "top_p", "repetition_penalty"),
    )

    image_root: Path = Field(Path("datasets/vision/coco"), description="folder of the images")
    coco_gt_root: Path = Field(
        Path("annotation/coco_gt"),
        description="folder of coco_karpathy_{val,test}_gt.json; without them, captions of the annotation files count",
    )
    batch_size: int | None = Field(None, ge=1, description="batch size of training and evaluation, unless they are set")
    init_lr: float = Field(1e-5, gt=0, description="highest learning rate")
    max_epoch: int = Field(5, ge=1, description="epochs of retraining (and of `train`)")
    interval: int = Field(100, ge=1, description="search steps between updates of the masks, with method reference")
    w_sp_attn: float = Field(3.2e-2, ge=0, description="weight of the sparsity term; affects only the logged loss")
    w_sp_mlp: float = Field(1e-3, ge=0)

    prompt: str = Field("a picture of ", description="prefix of every caption; not part of loss and scores")
    max_length: int = Field(20, ge=2, description="maximum tokens of a caption, prompt included")
    min_length: int = Field(5, ge=0, description="minimum tokens")
    num_beams: int = Field(3, ge=1, description="width of the beam search; 1 is greedy")
    sample: bool = Field(False, description="use nucleus sampling instead of beam search")
    top_p: float = Field(0.9, gt=0, le=1, description="probability of the nucleus")
    repetition_penalty: float | None = Field(
        None, gt=0, description="penalty for repeated tokens; by default 1.1 with sampling, else 1"
    )

    @model_validator(mode="before")
    @classmethod
    def _batch_sizes(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("batch_size") is not None:
            both = dict.fromkeys(("batch_size_train", "batch_size_test"), values["batch_size"])
            return {**both, **values}
        return values

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length ({self.min_length}) is above max_length ({self.max_length})")
        return self


class CaptionTask(BlipTask[CaptionSettings]):
    """Captioning: the model generates a caption for an image."""

    name: ClassVar[str] = "caption"
    pipeline: ClassVar[str | None] = "image-to-text"
    metric: ClassVar[str] = deciding_metric()
    shown: ClassVar[tuple[str, ...]] = ("bleu4", "cider", "spice", "exact")
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}
    settings: ClassVar[type[RunSettings]] = CaptionSettings
    model: ClassVar[type[nn.Module]] = BlipCaption
    config: ClassVar[type[BlipConfig]] = CaptionConfig

    def dataset(self, settings: CaptionSettings, split: str) -> Dataset[Any]:
        """Return a split: one sample per caption in training, one per image in evaluation."""
        file = settings.ann_root / f"coco_karpathy_{self.splits[split]}.json"
        size, outside = settings.image_size, settings.allow_outside
        if split == "train":
            transform = train_transform(size, settings.augment, settings.images)
            return CaptionTrainDataset(file, settings.image_root, transform, prompt=settings.prompt, outside=outside)
        truth = settings.coco_gt_root / f"coco_karpathy_{self.splits[split]}_gt.json"
        return CaptionEvalDataset(
            file, settings.image_root, eval_transform(size, settings.images), truth, outside=outside
        )

    def collate(self, settings: CaptionSettings) -> Callable[[list[Any]], Batch]:
        """Return the collator that stacks images and tokenizes captions."""
        return CaptionCollator(blip_tokenizer(settings.tokenizer), 1 + len(_prompt(settings)))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return images and tokens."""
        return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}

    @with_cross_loss
    def loss(self, model: nn.Module, batch: Batch, settings: CaptionSettings, epoch: float) -> Tensor:
        """Return the mean cross-entropy of the tokens after the prompt."""
        return caption_loss(model(**self.inputs(batch)), batch["labels"])

    def predict(self, model: nn.Module, batch: Batch, settings: CaptionSettings) -> dict[str, Tensor]:
        """Return "image_ids", [batch], and "words": token ids after the prompt, padded, [batch, tokens]."""
        assert isinstance(model, BlipCaption)
        prompt = _prompt(settings)
        penalty = settings.repetition_penalty or (_SAMPLING_PENALTY if settings.sample else 1.0)
        found = model.generate(
            batch["images"],
            prompt,
            blip_tokenizer(settings.tokenizer).sep_token_id,
            max_length=settings.max_length,
            min_length=settings.min_length,
            num_beams=settings.num_beams,
            sample=settings.sample,
            top_p=settings.top_p,
            repetition_penalty=penalty,
        )
        words = F.pad(found, (0, settings.max_length - found.shape[1]), value=PAD)[:, 1 + len(prompt) :]
        return {"image_ids": batch["image_ids"], "words": words}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: CaptionSettings
    ) -> dict[str, float]:
        """Return the metrics of `caption_scores`; {} without reference captions."""
        assert isinstance(samples, CaptionEvalDataset)
        if not samples.references:
            return {}
        return caption_scores(_captions(predictions, settings), samples.references)

    def files(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: CaptionSettings, split: str
    ) -> dict[str, Any]:
        """Return the captions in the format of COCO's evaluation server."""
        captions = _captions(predictions, settings)
        rows = [{"image_id": number, "caption": caption} for number, caption in captions.items()]
        return {f"caption_{self.splits[split]}.json": rows}

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: CaptionSettings,
        album: Album,
    ) -> list[Example]:
        """Return images and generated captions, with the first reference caption as the truth."""
        assert isinstance(samples, CaptionEvalDataset)
        captions = {name: _captions(rows, settings) for name, rows in found.items()}
        shown, plain = [], untransformed(samples)
        for number in numbers:
            item = plain[number]
            references = samples.references.get(item["image_id"])
            shown.append(
                Example(
                    images=(album.add(item["image"], str(number)),),
                    truth=Answer(text=references[0]) if references else None,
                    answers={name: Answer(text=texts[item["image_id"]]) for name, texts in captions.items()},
                )
            )
        return shown

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` grey images with captions of 15 tokens."""
        ids, mask = dummy_tokens(model, batch_size, _EXAMPLE_TOKENS)
        return {"images": blank_images(model, batch_size), "input_ids": ids, "attention_mask": mask}

    def _prepared(self, model: nn.Module, settings: CaptionSettings) -> nn.Module:
        positions: int = model.config.max_positions  # type: ignore[union-attr, assignment]
        if positions < max(settings.max_length, CAPTION_TOKENS):
            raise SettingError(
                f"The model has {positions} positions, and captions may have {CAPTION_TOKENS} tokens in training and "
                f"max_length={settings.max_length} in generation. Lower max_length, or set model.max_positions."
            )
        return super()._prepared(model, settings)


def _prompt(settings: CaptionSettings) -> list[int]:
    """Return the token ids of the prompt, without special tokens."""
    tokens: list[int] = blip_tokenizer(settings.tokenizer)(settings.prompt, add_special_tokens=False)["input_ids"]
    if 1 + len(tokens) >= min(settings.max_length, CAPTION_TOKENS):
        raise SettingError(
            f"The prompt {settings.prompt!r} has {len(tokens)} tokens, which leaves no room for a caption within "
            f"max_length={settings.max_length}. Raise max_length, or shorten the prompt."
        )
    return tokens


def _captions(predictions: Mapping[str, Tensor], settings: CaptionSettings) -> dict[int, str]:
    """Return image id -> generated caption."""
    texts = blip_tokenizer(settings.tokenizer).batch_decode(predictions["words"], skip_special_tokens=True)
    return dict(zip(predictions["image_ids"].tolist(), map(str.strip, texts), strict=True))
