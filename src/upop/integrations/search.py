"""What the callbacks share: a search that begins and ends with a training loop of another library."""

from __future__ import annotations

from typing import Any

from torch import nn

from upop.checkpoints import Pruner
from upop.errors import SettingError
from upop.pruning.choice import check_ratio


class Search:
    """The settings of a search, and its `Pruner` once the loop has begun.

    Args:
        ratio: share of the units' total cost to remove, in (0, 1); 0.5 is 2x.
        interval: masks move at every `interval`-th optimizer step, and at the last one; by default eight times.
        verify: inputs on which the masked and the shrunken model are compared at the end; by default a few samples of
            the first batch. False cuts without proof. See `upop.Pruner.shrink`.
        settings: any other argument of `upop.Pruner` but the model and the number of steps.

    Raises:
        SettingError: the ratio is out of its range.
    """

    def __init__(self, ratio: float, interval: int | None = None, *, verify: Any = True, **settings: Any) -> None:
        ratio = check_ratio(ratio)
        self.ratio, self.interval, self.verify, self.settings = ratio, interval, verify, settings
        self.pruner: Pruner | None = None

    def begin(self, model: nn.Module, steps: float) -> Pruner:
        """Put masks on the model for a loop of so many optimizer steps.

        Raises:
            SettingError: the number of steps is not known, or a setting is out of range.
            LayoutError: the model has nothing that can go.
        """
        if not 0 < steps < float("inf"):
            raise SettingError(
                f"A search needs to know how many optimizer steps it has, and the loop says {steps}. "
                "Give it a number of steps (max_steps)."
            )
        self.pruner = Pruner(model, self.ratio, int(steps), self.interval, **self.settings)
        return self.pruner

    def step(self) -> None:
        """Add a step's scores; the gradients are there, and the optimizer has not used them yet."""
        if self.pruner is not None and not self.pruner.finished:
            self.pruner.step()

    def end(self) -> None:
        """Cut the model for real.

        Raises:
            StepError: the loop ended before its last step.
            VerificationError: the shrunken model does not compute what the masked one did.
        """
        if self.pruner is not None:
            self.pruner.shrink(verify=self.verify)
