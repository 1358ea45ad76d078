"""Base of the retrieval tasks: settings, data, and evaluation in both directions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from upop.data.retrieval import RetrievalCollator, RetrievalGallery, RetrievalPairs
from upop.data.transforms import eval_transform, train_transform
from upop.examples import Album, Answer, Example
from upop.metrics.recall import CUTS, best_first, recall_scores
from upop.models.contrast import MomentumContrast, check_queue, processes
from upop.models.rerank import candidates
from upop.pruning import count_macs, count_parameters
from upop.runs.bad_images import readable, scored_indices
from upop.runs.devices import alone, autocast
from upop.runs.evaluation import samples_of
from upop.runs.examples import spread, untransformed
from upop.runs.loaders import SeededDataset
from upop.runs.task import Task
from upop.settings import LanguageSettings, RunSettings

_GALLERY = 40  # images to search for examples; a whole split would take as long as an evaluation
_SHOWN = 3  # best images per text
_FILES = {"coco": "coco_karpathy_{}.json", "flickr": "flickr30k_{}.json"}


class RetrievalSettings(LanguageSettings):
    """Settings of every retrieval task; the defaults are those published for the chosen data set."""

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "coco": {"image_root": "datasets/vision/coco", "interval": 200, "max_epoch": 6},
        "flickr": {"image_root": "datasets/vision/flickr", "interval": 50, "max_epoch": 12},
    }

    of_model: ClassVar[Mapping[str, str]] = {"image_size": "image_size", "queue_size": "queue_size"}

    dataset: Literal["coco", "flickr"] = Field("coco", description="data set, for annotation files and defaults")
    image_root: Path = Field(Path("datasets/vision/coco"), description="folder of the images")
    init_lr: float = Field(1e-5, gt=0, description="highest learning rate")
    batch_size_test: int = Field(64, ge=1, description="images per process and forward pass")
    queue_size: int = Field(57600, ge=1, description="features of earlier batches in the contrastive loss")
    alpha: float = Field(0.4, ge=0, le=1, description="weight of the soft targets; grows during the first epoch")

    @model_validator(mode="wrap")
    @classmethod
    def _of_data_set(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return handler(values)
        defaults = cls.published.get(str(values.get("dataset", "coco")), {})
        made = handler({**defaults, **values})
        made.model_fields_set.difference_update(set(defaults) - set(values))  # not set by a user
        return made

    def alpha_at(self, epoch: float) -> float:
        """Return the weight of the soft targets after `epoch` epochs; it grows linearly in the first."""
        return self.alpha * min(1.0, epoch)


SearchSettingsT = TypeVar("SearchSettingsT", bound=RunSettings)
RetrievalSettingsT = TypeVar("RetrievalSettingsT", bound=RetrievalSettings)


class Collator(Protocol):
    """The collator of a retrieval task."""

    def __call__(self, items: list[Any]) -> dict[str, Tensor]:
        """Collate items; "ids" holds the indices of the images, [batch]."""
        ...

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the model's inputs for texts, [texts, tokens] each."""
        ...


class Gallery(Protocol):
    """Images with all their texts; its items are the images.

    Attributes:
        texts: of all images.
        image_of_text: index of each text's image, [texts].
    """

    texts: list[str]
    image_of_text: Tensor

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, index: int) -> Any:
        """The image at an index."""
        ...

    def without(self, numbers: Collection[int]) -> Gallery:
        """Return the gallery without the images at these indices, and without their texts."""
        ...


@dataclass(frozen=True)
class Found:
    """Candidates by feature similarity, in both directions; on the device.

    Attributes:
        texts: candidates for each image, best first, [images, k].
        text_scores: their similarities.
        images: candidates for each text, [texts, l].
        image_scores: their similarities.
    """

    texts: Tensor
    text_scores: Tensor
    images: Tensor
    image_scores: Tensor


@dataclass(frozen=True)
class Kept:
    """The images that this process has encoded: their indices, [n], and states, [n, tokens, hidden], on the CPU."""

    numbers: Tensor
    states: Tensor | None


class Retrieval(Task[SearchSettingsT]):
    """Image-text retrieval in both directions.

    TR@k and IR@k are the percentage of queries with a correct result among the first k; r_mean, the mean of all six,
    decides.
    """

    metric: ClassVar[str] = "r_mean"
    shown: ClassVar[tuple[str, ...]] = ("TR@1", "IR@1")
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}

    @abstractmethod
    def collate(self, settings: SearchSettingsT) -> Collator:
        """Return the collator that stacks images and tokenizes captions."""

    @abstractmethod
    def text_features(self, model: nn.Module, words: Mapping[str, Tensor]) -> Tensor:
        """Return normalised features of texts, [batch, dim], from their inputs, [batch, tokens] each."""

    def candidate_counts(self, settings: SearchSettingsT) -> int:
        """Return the number of candidates per query: the largest k of the recalls."""
        return max(CUTS)

    def some_of(self, words: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
        """Return the inputs of some texts, without padding that they all share."""
        longest = int(words["attention_mask"][part].sum(1).max())
        return {name: value[part, :longest] for name, value in words.items()}

    def rescore(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        settings: SearchSettingsT,
        kept: Kept,
        words: Mapping[str, Tensor],
        found: Found,
    ) -> Found:
        """Return the candidates with re-ranked scores; by default they are unchanged."""
        return found

    def collect(
        self, accelerator: Accelerator, model: nn.Module, loader: Any, settings: SearchSettingsT
    ) -> dict[str, Tensor]:
        """Return the tensors of `Found` for all images and texts, equal on all processes."""
        kept, image = self._encode_images(accelerator, model, loader, settings)
        kept, image = _select(scored_indices(loader), kept, image)  # known once all images were read
        samples = cast(Gallery, samples_of(loader))
        words = self.collate(settings).tokenize(samples.texts)
        text = self._encode_texts(accelerator, model, words, image, settings)
        count = self.candidate_counts(settings)
        found = Found(*candidates(image, text, count), *candidates(text, image, count))
        found = self.rescore(accelerator, model, settings, kept, words, found)
        return {name: value.cpu() for name, value in vars(found).items()}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: SearchSettingsT
    ) -> dict[str, float]:
        """Return TR@k, IR@k and r_mean, in percent."""
        found = Found(**{name: predictions[name] for name in Found.__annotations__})
        return recall_scores(
            found.texts, found.text_scores, found.images, found.image_scores, cast(Gallery, samples).image_of_text
        )

    def answers(
        self, model: nn.Module, samples: Dataset[Any], numbers: Sequence[int], settings: SearchSettingsT
    ) -> Mapping[str, Any]:
        """Return "texts" for every image and "images" for every text of a part of the split, best first."""
        device = next(model.parameters()).device
        part = _gallery(cast(Gallery, samples), numbers)[0]
        gallery = SeededDataset(cast(Dataset[Any], part), settings.seed)
        loader: DataLoader[Any] = DataLoader(
            gallery, batch_size=settings.batch_size_test, collate_fn=self.collate(settings)
        )
        prepared = prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)
        rows = self.collect(alone(device), model, prepared, settings)
        return {name: best_first(rows[name], rows[f"{name.removesuffix('s')}_scores"]) for name in ("texts", "images")}

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: SearchSettingsT,
        album: Album,
    ) -> list[Example]:
        """Return alternately a text with its best images, and an image with its best text."""
        gallery, kept = _gallery(cast(Gallery, samples), numbers)
        plain, owners = untransformed(gallery), gallery.image_of_text.tolist()

        def image(place: int) -> str:
            return album.add(plain[place]["image"], str(kept[place]))

        shown = []
        for turn, number in enumerate(numbers):
            place = kept.index(number)
            query = owners.index(place)
            text = gallery.texts[query]
            if turn % 2 == 0:
                best = {name: rows["images"][query].tolist() for name, rows in found.items()}
                answers = {name: _images_for(places, place, image) for name, places in best.items()}
                shown.append(Example(prompt=text, truth=Answer(images=(image(place),)), answers=answers))
            else:
                first = {name: int(rows["texts"][place][0]) for name, rows in found.items()}
                answers = {
                    name: Answer(text=gallery.texts[best], right=owners[best] == place) for name, best in first.items()
                }
                shown.append(Example(images=(image(place),), truth=Answer(text=text), answers=answers))
        return shown

    def about_examples(self, samples: Dataset[Any], numbers: Sequence[int], split: str) -> str:
        """Return a sentence about the samples that `examples` shows, and the size of the gallery."""
        found_in = len(_gallery(cast(Gallery, samples), numbers)[1])
        return (
            f"{super().about_examples(samples, numbers, split)} The search runs over {found_in} images and all their "
            "texts, which is easier than over the whole split."
        )

    def _encode_images(
        self, accelerator: Accelerator, model: nn.Module, loader: Any, settings: SearchSettingsT
    ) -> tuple[Kept, Tensor]:
        """Return this process's images, and the features of all images, [images, dim]."""
        count = len(loader.dataset)
        features: Tensor | None = None
        states: Tensor | None = None
        numbers: list[int] = []
        taken: set[int] = set()
        for batch in readable(accelerator, loader):
            with autocast(accelerator, settings):
                rows = self.predict(model, batch, settings)
            everyone = accelerator.gather({"ids": batch["ids"], "features": rows["features"].float()})
            if features is None:
                features = everyone["features"].new_zeros(count, everyone["features"].shape[1])
                if "states" in rows:
                    most = len(loader) * len(batch["ids"])
                    states = torch.empty(most, *rows["states"].shape[1:], dtype=rows["states"].dtype)
            features[everyone["ids"]] = everyone["features"]
            # Repeated images fill up the last batches; the first process that has one keeps it.
            size = len(batch["ids"])
            for place, number in enumerate(everyone["ids"].tolist()):
                process, row = divmod(place, size)
                if number not in taken and process == accelerator.process_index:
                    if states is not None:
                        states[len(numbers)] = rows["states"][row].cpu()
                    numbers.append(number)
                taken.add(number)
        assert features is not None
        return Kept(
            torch.tensor(numbers, dtype=torch.long), None if states is None else states[: len(numbers)]
        ), features

    def _encode_texts(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        words: Mapping[str, Tensor],
        image: Tensor,
        settings: SearchSettingsT,
    ) -> Tensor:
        """Return the features of all texts, [texts, dim]; each process encodes its share."""
        features = image.new_zeros(len(next(iter(words.values()))), image.shape[1])
        for start in range(0, len(features), settings.batch_size_test)[
            accelerator.process_index :: accelerator.num_processes
        ]:
            part = slice(start, start + settings.batch_size_test)
            block = {name: value.to(accelerator.device) for name, value in self.some_of(words, part).items()}
            with autocast(accelerator, settings):
                features[part] = self.text_features(model, block).to(features.dtype)
        return summed(accelerator, features)


class RetrievalTask(Retrieval[RetrievalSettingsT]):
    """Retrieval on the published data sets, with the published models."""

    @abstractmethod
    def collate(self, settings: RetrievalSettingsT) -> RetrievalCollator:
        """Return the collator that stacks images and tokenizes captions."""

    def dataset(self, settings: RetrievalSettingsT, split: str) -> Dataset[Any]:
        """Return image-text pairs in training, and images with all their texts in evaluation.

        Raises:
            SettingError: the queue is not a multiple of the batches.
        """
        file = settings.ann_root / _FILES[settings.dataset].format(self.splits[split])
        size, outside = settings.image_size, settings.allow_outside
        if split == "train":
            samples = RetrievalPairs(
                file, settings.image_root, train_transform(size, settings.augment, settings.images), outside=outside
            )
            # One batch per process.
            check_queue(settings.queue_size, min(settings.batch_size_train, len(samples)) * processes())
            return samples
        return RetrievalGallery(file, settings.image_root, eval_transform(size, settings.images), outside=outside)

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Return the sizes of the deployed model, without momentum encoders, and the published counts.

        The published parameters include the momentum encoders. The published multiply-adds are those of the loss of one
        pair: momentum encoders, similarities with the queues, and three matchings.
        """
        assert isinstance(model, MomentumContrast)
        copies = sum(copy.numel() for _, copy in model.momentum_pairs())
        parameters = count_parameters(model)
        training = {**self.example(model, 1), **self.published_example(model)}
        return {
            "parameters": parameters - copies,
            "gmacs": count_macs(model, self.example(model, 1)) / 1e9,
            "published_parameters": parameters,
            "published_gmacs": count_macs(model, training) / 1e9,
        }

    def published_example(self, model: nn.Module) -> dict[str, Any]:
        """Return the additional inputs of the loss for one pair."""
        return {"ids": torch.zeros(1, dtype=torch.long, device=next(model.parameters()).device)}


def _select(numbers: Tensor | None, kept: Kept, features: Tensor) -> tuple[Kept, Tensor]:
    """Return only the images at these indices, renumbered, and their features; all of them for None."""
    if numbers is None:
        return kept, features
    new = torch.full((len(features),), -1)
    new[numbers] = torch.arange(len(numbers))
    rows = new[kept.numbers] >= 0
    states = None if kept.states is None else kept.states[rows]
    return Kept(new[kept.numbers[rows]], states), features[numbers.to(features.device)]


def summed(accelerator: Accelerator, table: Tensor) -> Tensor:
    """Return the sum over processes of a table that each has filled in part, with 0 elsewhere."""
    return cast(Tensor, accelerator.reduce(table, "sum"))


def _gallery(samples: Gallery, numbers: Sequence[int]) -> tuple[Gallery, list[int]]:
    """Return a part of a gallery with the images at these indices, and the indices of all its images."""
    kept = sorted({*numbers, *spread(len(samples), _GALLERY)})
    return samples.without(set(range(len(samples))) - set(kept)), kept


def _images_for(places: list[int], right: int, image: Callable[[int], str]) -> Answer:
    """Return the best images for a text, with the rank of the correct one unless it is the first."""
    at = places.index(right) + 1 if right in places else None
    where = "the correct one is ranked lower" if at is None else f"the correct one is ranked {at}"
    best = tuple(image(place) for place in places[:_SHOWN])
    return Answer(images=best, note=None if at == 1 else where, right=at == 1)
