"""The base class of the callbacks: a compression that begins and ends with another library's training loop."""

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
        settings: further arguments of `upop.Compression`, except the model and the number of steps: target (instead of
            a ratio), teacher, search_share, round_to, verify, ...

    Attributes:
        compression: the compression of the current or last training, or None.

    Raises:
        SettingError: the ratio or the target is out of its range.
    """

    def __init__(self, ratio: float | None = None, **settings: Any) -> None:
        self.ratio, self.settings = Goal(ratio, settings.get("target")).ratio, settings
        self.compression: Compression | None = None
        self._fitting: RemovableHandle | None = None
        self._dense: nn.Module | None = None

    def begin(self, model: nn.Module, steps: float, state: Mapping[str, Any] | None = None) -> Compression:
        """Start the compression.

        Args:
            model: the dense model, or one that `expect` has cut.
            steps: number of optimizer steps of the whole training.
            state: the state of the compression in the checkpoint to resume from.

        Raises:
            SettingError: the number of steps is unknown, or a setting is out of range.
            LayoutError: the model has no prunable group.
        """
        if not 0 < steps < float("inf"):
            raise SettingError(
                f"A compression needs the number of optimizer steps, and the loop has {steps}. Set it (max_steps)."
            )
        settings = dict(self.settings)
        if self._fitting is not None:
            self._fitting.remove()
        if state is not None and self._dense is not None and settings.get("teacher") in (None, True):
            settings["teacher"] = self._dense  # the model already has the checkpoint's weights
        self._dense = None
        self.compression = Compression(model, self.ratio, int(steps), resume=state, **settings)
        return self.compression

    def expect(self, model: nn.Module) -> None:
        """Prepare for a resumed training: keep a dense copy, and cut the model if the loaded weights are of a cut one.

        Libraries load the weights of a checkpoint before they call `begin`.
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
