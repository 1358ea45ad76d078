"""CoOp: CLIP as a classifier, with learned context vectors around the class names (arXiv 2109.01134).

With CrossGET its image tower merges tokens. Only context and cross tokens are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.errors import SettingError
from upop.models.crossget import CrossGetClip, CrossGetConfig
from upop.tokens.losses import cross_loss, layer_by_layer

_CROSS_WEIGHT = 10
"""Weight of the cross loss, as published."""


class CoOpLosses(NamedTuple):
    """The losses of a batch, scalars: the cross-entropy, and the weighted cross loss."""

    classes: Tensor
    cross: Tensor

    def total(self) -> Tensor:
        """Return the training loss, the mean of both."""
        return (self.classes + self.cross) / 2


class CoOp(nn.Module):
    """CLIP with learned prompts.

    Attributes:
        clip: the towers; the text tower has no word embedding.
        context: learned vectors, [context, hidden], or one set per class, [classes, context, hidden].
        prefix: embedding of the first token, [classes, 1, hidden].
        suffix: embeddings of class names and the tokens after them, [classes, tokens - 1 - context, hidden].
        ends: position of each prompt's end token, [classes].
    """

    prefix: Tensor
    suffix: Tensor
    ends: Tensor

    def __init__(
        self,
        config: CrossGetConfig,
        prefix: Tensor,
        suffix: Tensor,
        ends: Tensor,
        context: Tensor,
        names: Sequence[int] | None = None,
    ) -> None:
        """Build it.

        Args:
            config: of the towers; `rl` must be 0, as in all published commands.
            prefix: see the class.
            suffix: see the class.
            ends: see the class.
            context: see the class.
            names: number of tokens of each class name, if half of the context goes after it; None puts all of the
                context in front.

        Raises:
            SettingError: `rl` is not 0.
        """
        super().__init__()
        if config.rl:
            raise SettingError(
                f"rl={config.rl} would remove text tokens, and CoOp's prompts have none to spare. Use rl=0."
            )
        self.clip = CrossGetClip(config)
        # Prompts are vectors, and CoOp's checkpoints have no word embedding.
        self.clip.text_model.embeddings.token_embedding = nn.Identity()  # type: ignore[union-attr]
        self.context = nn.Parameter(context.clone())
        for name, value in (("prefix", prefix), ("suffix", suffix), ("ends", ends)):
            self.register_buffer(name, value)
        self._names = tuple(names) if names is not None else None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: context and cross tokens."""
        return {name: each for name, each in self.named_parameters() if name == "context" or "cross_" in name}

    def prompts(self) -> Tensor:
        """Return the prompts of all classes, [classes, tokens, hidden]."""
        context: Tensor = self.context
        if context.dim() == 2:
            context = context.expand(len(self.prefix), *context.shape)
        if self._names is None:
            return torch.cat([self.prefix, context, self.suffix], 1)
        half = context.shape[1] // 2
        rows = [
            torch.cat([first, learned[:half], rest[:words], learned[half:], rest[words:]])
            for first, learned, rest, words in zip(self.prefix, context, self.suffix, self._names, strict=True)
        ]
        return torch.stack(rows)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | CoOpLosses:
        """Return logits, [batch, classes]; with `labels`, [batch], the losses.

        Args:
            images: [batch, 3, size, size].
            labels: class indices, [batch].
        """
        image, text = self.clip.encode_image(images), self.clip.encode_words(self.prompts(), self.ends)
        scale = self.clip.logit_scale.exp()
        logits = scale * F.normalize(image.features, dim=-1) @ F.normalize(text.features, dim=-1).t()
        if labels is None:
            return logits
        classes = F.cross_entropy(logits, labels)
        if not image.crosses:
            return CoOpLosses(classes, torch.zeros_like(classes))
        images_, texts = layer_by_layer(image.crosses, [each[labels] for each in text.crosses])
        return CoOpLosses(classes, _CROSS_WEIGHT * cross_loss(torch.cat(images_), torch.cat(texts)))


def ends_of(suffix: Tensor, before: int) -> Tensor:
    """Return the position of each prompt's end token, [classes]: the last one before repeated padding vectors.

    Args:
        suffix: embeddings of class names and the tokens after them, [classes, tokens, hidden].
        before: number of vectors before them in a prompt.
    """
    padding = (suffix == suffix[:, -1:]).all(2)
    inside = torch.arange(suffix.shape[1], device=suffix.device) * ~padding
    return inside.amax(1) + before
