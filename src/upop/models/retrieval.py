"""BLIP for image-text retrieval.

Two towers, trained by momentum contrast, give features for a fast search. The text encoder then attends to the images
of the best candidates, and a head classifies whether image and text match.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextModel

from upop.models.blip import BlipConfig, build_vision_encoder, keep_position_ids, text_config
from upop.models.contrast import (
    MomentumContrast,
    draw_negatives,
    draw_noise,
    gather_texts,
    gather_with_gradients,
)
from upop.models.sizes import some_images, some_words
from upop.pruning.precision import precise


class RetrievalConfig(BlipConfig):
    """Sizes of BLIP for retrieval before pruning, and of its momentum contrast."""

    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth rate of the vision transformer's last block"
    )
    embed_dim: int = Field(256, gt=0, description="size of the features")
    queue_size: int = Field(57600, gt=0, description="features of earlier batches in the contrastive loss")
    momentum: float = Field(0.995, ge=0, lt=1, description="momentum of the momentum encoders")


class Comparison(NamedTuple):
    """Features and matching logits of images and texts."""

    image_features: Tensor
    """Normalised, [images, embed_dim]."""
    text_features: Tensor
    """Normalised, [texts, embed_dim]."""
    logits: Tensor
    """Of no match and match, for every pair, [images, texts, 2]."""


class RetrievalLosses(NamedTuple):
    """The two losses of a batch, scalars; the published loss is their sum."""

    contrastive: Tensor
    matching: Tensor


class SharedCrossAttention(BlipTextAttention):
    """Cross-attention of several texts to one image, whose keys and values are computed once.

    Texts of an image are consecutive: states, [texts, tokens, text_width], attend to images, [images, patches,
    vision_width], with equally many texts per image.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,  # their names differ between versions of transformers
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the new states, [texts, tokens, text_width], and the library's attention weights."""
        # Cross-attention treats all tokens alike, so the texts of an image are joined to one sequence.
        assert encoder_hidden_states is not None
        joined = hidden_states.reshape(encoder_hidden_states.shape[0], -1, hidden_states.shape[-1])
        states, weights = super().forward(joined, attention_mask, encoder_hidden_states, *args, **kwargs)
        return states.reshape(hidden_states.shape), weights


class BlipRetrieval(MomentumContrast):
    """BLIP for retrieval, with the parameter names of the published checkpoints."""

    momentum_encoders = {  # noqa: RUF012 - read-only
        name: f"{name}_m" for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
    }

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_encoder(config)
        self.text_encoder = BlipTextModel(text_config(config), add_pooling_layer=False)
        keep_position_ids(self.text_encoder.embeddings)
        for layer in self.text_encoder.encoder.layer:
            layer.crossattention.__class__ = SharedCrossAttention
        self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_width, config.embed_dim)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        for name, momentum_encoder in self.momentum_encoders.items():
            setattr(self, momentum_encoder, copy.deepcopy(getattr(self, name)))
        self.copy_to_momentum()
        self.add_queues(config.embed_dim, config.queue_size)
        self._warned = False
        self._drawn: dict[str, Any] = {}

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Small inputs, for `upop.find_prunable` to trace the model."""
        return {"images": some_images(self.config), **some_words(self.config)}

    def remake_queues(self, size: int) -> None:
        """Reinitialise the queues for `size` features."""
        super().remake_queues(size)
        self.config = self.config.model_copy(update={"queue_size": size})

    def replay_arguments(self) -> dict[str, Any]:
        """Return the hard negatives of the last loss, so that a teacher uses the same pairs."""
        return self._drawn

    def encode_image(self, images: Tensor, *, momentum: bool = False) -> tuple[Tensor, Tensor]:
        """Return states, [batch, patches, vision_width], and normalised features, [batch, embed_dim], of images.

        Args:
            images: [batch, 3, size, size].
            momentum: whether to use the momentum encoders.
        """
        tower, head = self._towers("visual_encoder", "vision_proj", momentum)
        states = tower(images)
        return states, F.normalize(head(states[:, 0]), dim=-1)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, *, momentum: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return states, [batch, tokens, text_width], and normalised features, [batch, embed_dim], of texts alone.

        Args:
            input_ids: token ids, [batch, tokens]; the first is [CLS].
            attention_mask: 1 for tokens, 0 for padding, [batch, tokens].
            momentum: whether to use the momentum encoders.
        """
        tower, head = self._towers("text_encoder", "text_proj", momentum)
        states = tower(input_ids, attention_mask=attention_mask, is_decoder=False).last_hidden_state
        return states, F.normalize(head(states[:, 0]), dim=-1)

    def match(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of no match and match, [texts, 2].

        Args:
            image_states: [images, patches, vision_width].
            input_ids: equally many texts per image, consecutive for each, [texts, tokens].
            attention_mask: 1 for tokens, 0 for padding, [texts, tokens].
        """
        # The first token becomes [ENC], the last word of the vocabulary, as in all published checkpoints.
        first = torch.full_like(input_ids[:, :1], self.config.vocab_size - 1)
        states = self.text_encoder(
            torch.cat([first, input_ids[:, 1:]], dim=1),
            attention_mask=attention_mask,
            encoder_hidden_states=image_states,
            is_decoder=False,
        ).last_hidden_state
        return cast(Tensor, self.itm_head(states[:, 0]))

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        ids: Tensor | None = None,
        alpha: float = 0.0,
        draws: Tensor | None = None,
        all_ranks: bool = True,
    ) -> Comparison | RetrievalLosses:
        """Compare images with texts; with `ids`, return the losses of a batch of pairs.

        In training mode the losses also clamp the temperature, update the momentum encoders and fill the queues.

        Args:
            images: [batch, 3, size, size].
            input_ids: token ids of the texts, [texts, tokens]; one text per image if `ids` are given.
            attention_mask: 1 for tokens, 0 for padding, [texts, tokens].
            ids: image number of each pair, [batch]; pairs with equal numbers are positives.
            alpha: weight of the momentum encoders' similarities in the contrastive targets.
            draws: hard negatives as indices of pairs of all processes: an image for each text, then a text for each
                image, [2 * batch]; drawn by similarity if None.
            all_ranks: whether hard negatives come from the batches of all processes. In evaluation mode, processes
                communicate only if `draws` are given.
        """
        if ids is not None:
            return self._losses(images, input_ids, attention_mask, ids, alpha, draws, all_ranks)
        states, image = self.encode_image(images)
        _, text = self.encode_text(input_ids, attention_mask)
        count = len(states)
        logits = self.match(states, input_ids.repeat(count, 1), attention_mask.repeat(count, 1))
        return Comparison(image, text, logits.view(count, -1, 2))

    def _losses(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        ids: Tensor,
        alpha: float,
        draws: Tensor | None,
        all_ranks: bool,
    ) -> RetrievalLosses:
        if self.training:
            with torch.no_grad():
                self.temp.clamp_(0.001, 0.5)
        states, image = self.encode_image(images)
        _, text = self.encode_text(input_ids, attention_mask)
        with torch.no_grad():
            if self.training:
                self.update_momentum(self.config.momentum)
            _, image_m = self.encode_image(images, momentum=True)
            _, text_m = self.encode_text(input_ids, attention_mask, momentum=True)
        contrastive = self.contrastive_loss(image, text, image_m, text_m, ids, alpha, 1 / self.temp)
        if self.training:
            self.enqueue(image_m, text_m, ids)
        shared = all_ranks and (self.training or draws is not None)
        index, paired = self._negatives(image.detach(), text.detach(), ids, draws, shared)
        self._drawn = {"draws": index.flatten(), "all_ranks": shared}
        negative_states = (gather_with_gradients(states) if shared else states)[index[0]]
        every_text = [gather_texts(part) if shared else part for part in (input_ids, attention_mask)]
        pad = every_text[0].shape[1] - input_ids.shape[1]
        own_text = [F.pad(part, (0, pad)) for part in (input_ids, attention_mask)]
        texts = [torch.cat([own, own, every[index[1]]]) for own, every in zip(own_text, every_text, strict=True)]
        logits = self.match(torch.cat([states, negative_states, states]), texts[0], texts[1])
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(ids)] = 1
        losses = F.cross_entropy(precise(logits), labels, reduction="none")
        return RetrievalLosses(contrastive, (losses * paired.repeat(3)).mean())

    @torch.no_grad()
    def _negatives(
        self, image: Tensor, text: Tensor, ids: Tensor, draws: Tensor | None, shared: bool
    ) -> tuple[Tensor, Tensor]:
        """Return hard negatives, an image per text and a text per image, [2, batch], and who has any, [batch]."""
        images, texts, numbers = (self.gathered(part) if shared else part for part in (image, text, ids))
        same = ids.unsqueeze(1) == numbers.unsqueeze(0)
        if draws is not None:
            return draws.view(2, -1), ~same.all(1)
        noise = draw_noise(len(ids), len(numbers), ids.device)
        drawn = [
            draw_negatives((query @ keys.t() / self.temp).float(), same, part)
            for query, keys, part in ((text, images, noise[0]), (image, texts, noise[1]))
        ]
        paired = drawn[0][1]
        if not self._warned and not paired.all():
            self._warned = True
            warnings.warn(
                "Some pairs of a batch have no hard negative (a batch of one pair, or of one image), and add no "
                "matching loss. Raise batch_size_train if this happens often.",
                stacklevel=2,
            )
        return torch.stack([index for index, _ in drawn]), paired

    def _towers(self, tower: str, head: str, momentum: bool) -> tuple[nn.Module, nn.Module]:
        names = (self.momentum_encoders[tower], self.momentum_encoders[head]) if momentum else (tower, head)
        return getattr(self, names[0]), getattr(self, names[1])
