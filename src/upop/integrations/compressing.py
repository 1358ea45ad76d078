"""What the callbacks share: a compression that begins and ends with a training loop of another library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upop.checkpoints.fitting.fit import cut_to_fit
from upop.compression import Compression
from upop.errors import SettingError
from upop.pruning.duplicates import duplicate
from upop.pruning.goal import Goal


class Compressing:
    """The settings of a compression, and the `upop.Compression` once the loop has begun.

    Args:
        ratio: share of the prunable parameters to remove, in (0, 1).
        settings: any other argument of `upop.Compression` but the model and the number of steps: target (in place of a
            ratio), teacher, share, round_to, verify, ...

    Attributes:
        compression: of the last training that began, or None.

    Raises:
        SettingError: the ratio or the target is out of its range.
    """

    def __init__(self, ratio: float | None = None, **settings: Any) -> None:
        self.ratio, self.settings = Goal(ratio, settings.get("target")).ratio, settings
        self.compression: Compression | None = None
        self._fitting: RemovableHandle | None = None
        self._dense: nn.Module | None = None

    def begin(self, model: nn.Module, steps: float, state: Mapping[str, Any] | None = None) -> Compression:
        """Compress a model in a loop of so many optimizer steps.

        Args:
            model: the dense model, or one that `expect` has cut.
            steps: of the whole training.
            state: of the compression of which the checkpoint is that the training goes on from.

        Raises:
            SettingError: the number of steps is not known, or a setting is out of range.
            LayoutError: the model has nothing that can go.
        """
        if not 0 < steps < float("inf"):
            raise SettingError(
                f"A compression needs to know how many optimizer steps it has, and the loop says {steps}. "
                "Give it a number of steps (max_steps)."
            )
        settings = dict(self.settings)
        if self._fitting is not None:
            self._fitting.remove()
        if state is not None and self._dense is not None and settings.get("teacher") in (None, True):
            settings["teacher"] = self._dense  # the model has the checkpoint's weights by now
        self._dense = None
        self.compression = Compression(model, self.ratio, int(steps), resume=state, **settings)
        return self.compression

    def expect(self, model: nn.Module) -> None:
        """Keep the dense model when weights are loaded into it, and cut it if they are of one that was cut already.

        Libraries load the weights of a checkpoint that is resumed before they say that a training begins.
        """
        self._fitting = model.register_load_state_dict_pre_hook(self._fit)

    def _fit(self, model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        if self._dense is None:
            self._dense = duplicate(model)
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        mine = dict(model.named_parameters())
        if all(own[name].shape == each.shape for name, each in mine.items() if name in own):
            return
        cut_to_fit(model, own, "The checkpoint")
