"""CoOp: CLIP as a classifier, whose prompts are learned vectors around the names of the classes (arXiv 2109.01134).

With CrossGET its image tower merges tokens; prompts and cross tokens are all that is trained.
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
"""Of the cross loss beside the cross entropy, as published."""


class CoOpLosses(NamedTuple):
    """The losses of a batch, scalars: of the classes, and of the cross tokens with their weight."""

    classes: Tensor
    cross: Tensor

    def total(self) -> Tensor:
        """What is minimised: the mean of both."""
        return (self.classes + self.cross) / 2


class CoOp(nn.Module):
    """CLIP with learned prompts.

    Attributes:
        clip: the towers; their text tower has no words of its own.
        context: the learned vectors, [n, C], or of each class, [classes, n, C].
        prefix: the first token's embedding for every class, [classes, 1, C].
        suffix: the names' embeddings and what follows them, [classes, T - 1 - n, C].
        ends: where each prompt ends, [classes].
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
            names: words of each class's name, where the context stands half before and half behind it; if not given,
                all of it stands before.

        Raises:
            SettingError: text tokens are to be removed.
        """
        super().__init__()
        if config.rl:
            raise SettingError(
                f"rl={config.rl} would remove text tokens, and CoOp's prompts have no more than they need. Use rl=0."
            )
        self.clip = CrossGetClip(config)
        # Prompts are made of vectors: there is no table of words in a file of CoOp's.
        self.clip.text_model.embeddings.token_embedding = nn.Identity()  # type: ignore[union-attr]
        self.context = nn.Parameter(context.clone())
        for name, value in (("prefix", prefix), ("suffix", suffix), ("ends", ends)):
            self.register_buffer(name, value)
        self._names = tuple(names) if names is not None else None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the context and the cross tokens."""
        return {name: each for name, each in self.named_parameters() if name == "context" or "cross_" in name}

    def prompts(self) -> Tensor:
        """Return the prompts of all classes, [classes, T, C]."""
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
        """Return the logits of the classes, [B, classes], of images [B, 3, S, S]; with `labels` [batch], the losses."""
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
    """Return where prompts end, [classes]: behind the last word stands one vector, that of padding, again and again.

    Args:
        suffix: embeddings of the names and what follows, [classes, L, C].
        before: vectors that stand before them in a prompt.
    """
    padding = (suffix == suffix[:, -1:]).all(2)
    inside = torch.arange(suffix.shape[1], device=suffix.device) * ~padding
    return inside.amax(1) + before
