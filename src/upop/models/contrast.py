"""Momentum contrast for the retrieval models: momentum encoders, queues, and gathering over processes.

The loss compares a batch's features with those of momentum encoders, for the same batch and for earlier ones in queues
(MoCo, arXiv 1911.05722), with ALBEF's soft targets (arXiv 2107.07651). Features of all processes are gathered in the
order of ranks, so that several processes compute the same as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather as all_gather_with_grad

from upop.errors import SettingError
from upop.pruning.traits import ModelTraits

NO_ID = -100
"""Value of `idx_queue` for empty places."""


def processes() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if processes() > 1 else 0


@torch.no_grad()
def gather(rows: Tensor) -> Tensor:
    """Return the rows of all processes, [processes * batch, ...], in the order of ranks, without gradients.

    Args:
        rows: [batch, ...], of the same shape on all processes.
    """
    if processes() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradients(rows: Tensor) -> Tensor:
    """Return the rows of all processes like `gather`, with gradients for the process that they come from."""
    return torch.cat(all_gather_with_grad(rows)) if processes() > 1 else rows


@torch.no_grad()
def gather_texts(tokens: Tensor) -> Tensor:
    """Return the token ids of all processes, [processes * batch, tokens], padded with 0 to the longest."""
    if processes() == 1:
        return tokens
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return gather(F.pad(tokens, (0, int(longest) - tokens.shape[1])))


def own_rows(count: int) -> slice:
    """Return the slice of this process's `count` rows among the gathered ones."""
    return slice(rank() * count, (rank() + 1) * count)


def draw_noise(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return uniform noise in (0, 1] for this process's rows, [2, rows, columns]: two draws of a column per row.

    Every process draws the noise of all and uses its own, so that draws do not depend on the number of processes.
    """
    noise = 1 - torch.rand(2, processes() * rows, columns)
    return noise[:, own_rows(rows)].to(device)


def draw_negatives(logits: Tensor, same: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a hard negative for each row: a column, with probabilities from the softmax of its logits.

    Args:
        logits: similarities, [batch, columns].
        same: positives, which are never drawn, [batch, columns].
        noise: uniform in (0, 1], [batch, columns]; see `draw_noise`.

    Returns:
        The columns, [batch], and whether the row has any negative, [batch].
    """
    # The argmax of logits with Gumbel noise is a draw from the softmax, without underflow of its probabilities.
    tiny = torch.finfo(noise.dtype).tiny
    gumbel = -torch.log((-torch.log(noise)).clamp_min(tiny))
    perturbed = (logits + gumbel).masked_fill(same, -torch.inf)
    return perturbed.argmax(1), ~same.all(1)


class MomentumContrast(nn.Module, ModelTraits):
    """Base of models with momentum encoders and queues.

    A subclass sets `momentum_encoders` (see `ModelTraits`), builds its towers and momentum encoders, and then calls
    `add_queues` and `copy_to_momentum`.
    """

    image_queue: Tensor
    text_queue: Tensor
    idx_queue: Tensor
    ptr_queue: Tensor

    def momentum_pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield pairs of a parameter and its momentum copy."""
        for name, copy_name in self.momentum_encoders.items():
            online, copy = attrgetter(name)(self), attrgetter(copy_name)(self)
            if isinstance(online, nn.Parameter):
                yield online, copy
                continue
            copies = dict(copy.named_parameters())
            for key, parameter in online.named_parameters():
                yield parameter, copies[key]

    @torch.no_grad()
    def copy_to_momentum(self) -> None:
        """Copy the weights to the momentum encoders, and exclude these from training."""
        for parameter, copy in self.momentum_pairs():
            copy.copy_(parameter)
            copy.requires_grad_(False)

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """Update the momentum encoders: copy = momentum * copy + (1 - momentum) * parameter."""
        for parameter, copy in self.momentum_pairs():
            copy.mul_(momentum).add_(parameter, alpha=1 - momentum)

    def add_queues(self, width: int, size: int) -> None:
        """Register `image_queue` and `text_queue`, [width, size], `idx_queue`, [1, size], and `ptr_queue`, [1].

        They start with random unit vectors that are positives of no image.
        """
        for name, value in fresh_queues(width, size).items():
            self.register_buffer(name, value)

    def remake_queues(self, size: int) -> None:
        """Reinitialise the queues for `size` features."""
        queue = self.image_queue
        for name, value in fresh_queues(queue.shape[0], size).items():
            setattr(self, name, value.to(queue.device, queue.dtype if value.is_floating_point() else None))

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in training, and the own ones in evaluation."""
        return gather(rows) if self.training else rows.detach()

    def contrastive_loss(
        self,
        image: Tensor,
        text: Tensor,
        image_m: Tensor,
        text_m: Tensor,
        ids: Tensor,
        alpha: float,
        scale: Tensor,
    ) -> Tensor:
        """Return the cross-entropy to soft targets, averaged over both directions, a scalar.

        Keys are the features of all processes and the queue, so that the loss does not depend on the number of
        processes. The published code uses those of its own process; with one process both are the same.

        Args:
            image: normalised features of images, [batch, dim].
            text: normalised features of texts, [batch, dim].
            image_m: those of the momentum encoder, [batch, dim].
            text_m: those of the momentum encoder, [batch, dim].
            ids: image number of each pair, [batch]; pairs with equal numbers are positives.
            alpha: weight of the momentum encoders' similarities in the targets.
            scale: of the similarities (1 / temperature), a scalar.
        """
        with _full_precision(image.device):
            dtype = self.image_queue.dtype
            image, text, image_m, text_m = (part.to(dtype) for part in (image, text, image_m, text_m))
            images = torch.cat([self.gathered(image_m).t(), self.image_queue], dim=1)
            texts = torch.cat([self.gathered(text_m).t(), self.text_queue], dim=1)
            same = ids.unsqueeze(1) == torch.cat([self.gathered(ids), self.idx_queue[0]]).unsqueeze(0)
            # In float32 for any precision of the model, as published.
            hard = same.float() / same.float().sum(1, keepdim=True)
            losses = []
            for query, query_m, keys in ((image, image_m, texts), (text, text_m, images)):
                with torch.no_grad():
                    soft = F.softmax(query_m @ keys * scale, dim=1)
                    targets = alpha * soft + (1 - alpha) * hard
                losses.append(F.cross_entropy(query @ keys * scale, targets))
            return (losses[0] + losses[1]) / 2

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Replace the oldest entries of the queues by features, [batch, dim], and ids, [batch], of all processes.

        Any batch up to the size of the queue fits; writing wraps around at the end.

        Raises:
            SettingError: the batch of all processes is larger than the queue.
        """
        ids = self.gathered(ids)
        size = self.idx_queue.shape[1]
        check_queue(size, len(ids))
        places = (self.ptr_queue + torch.arange(len(ids), device=ids.device)) % size
        self.image_queue[:, places] = self.gathered(image).t().to(self.image_queue.dtype)
        self.text_queue[:, places] = self.gathered(text).t().to(self.text_queue.dtype)
        self.idx_queue[0, places] = ids
        self.ptr_queue.copy_((self.ptr_queue + len(ids)) % size)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    # The meta device, used to count multiply-adds of large models, has no autocast.
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def check_queue(size: int, batch: int) -> None:
    """Raise a `SettingError` if a queue of `size` is smaller than a `batch` of all processes together."""
    if batch > size:
        raise SettingError(
            f"queue_size is {size}, and a batch of all processes together has {batch} samples. "
            f"Set queue_size to {batch} or more, or lower batch_size_train."
        )


def fresh_queues(width: int, size: int) -> dict[str, Tensor]:
    """Return initial queues by name; see `MomentumContrast.add_queues`."""
    return {
        "image_queue": F.normalize(torch.randn(width, size), dim=0),
        "text_queue": F.normalize(torch.randn(width, size), dim=0),
        "idx_queue": torch.full((1, size), NO_ID, dtype=torch.long),
        "ptr_queue": torch.zeros(1, dtype=torch.long),
    }
