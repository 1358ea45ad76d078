"""A callback for Lightning: one fit is the search, and the model that it leaves is smaller."""

from __future__ import annotations

from typing import Any

from torch import nn

from upop.errors import SettingError
from upop.integrations.search import Search

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("LightningCallback needs lightning: pip install 'upop[integrations]'.") from error


class LightningCallback(Search, Callback):
    """Searches while a Trainer fits, and cuts the model when it is done; then fit it again to let it recover.

    Lightning calls it before it clips gradients, and saves the search in its own checkpoints, so that `ckpt_path` goes
    on with it.

    Args:
        ratio: share of the units' total cost to remove, in (0, 1); 0.5 is 2x.
        interval: masks move at every `interval`-th optimizer step, and at the last one; by default eight times.
        module: name of the attribute of the LightningModule that is compressed. If not given, the whole module; or,
            where that has no forward of its own and holds one model, this model, which is what is called.
        verify: inputs on which the masked and the shrunken model are compared at the end; by default a few samples of
            the first batch. False cuts without proof. See `upop.Pruner.shrink`.
        settings: any other argument of `upop.Pruner` but the model and the number of steps.

    Raises:
        SettingError: the ratio is out of its range; at the start of the fit, a setting that makes no sense.
        StepError: at the end of the fit, when it was stopped before its last step.
    """

    def __init__(
        self,
        ratio: float,
        interval: int | None = None,
        *,
        module: str | None = None,
        verify: Any = True,
        **settings: Any,
    ) -> None:
        super().__init__(ratio, interval, verify=verify, **settings)
        self._module = module
        self._resumed: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put masks on the model, or go on with the search of the checkpoint that is resumed."""
        model: Any = _called(pl_module) if self._module is None else getattr(pl_module, self._module, None)
        if not isinstance(model, nn.Module):
            raise SettingError(
                f"module={self._module!r} was asked for, and {type(pl_module).__name__} has no module of this name."
            )
        pruner = self.begin(model, trainer.estimated_stepping_batches)
        if self._resumed is not None:
            pruner.load_state_dict(self._resumed)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take this step's scores."""
        self.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the model for real."""
        self.end()

    def state_dict(self) -> dict[str, Any]:
        """Return the search, for Lightning's checkpoint."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the search of a checkpoint until the fit begins."""
        self._resumed = state_dict or None


def _called(module: LightningModule) -> nn.Module:
    """Return what the steps of a module call: what they call instead of a module without a forward of its own."""
    held = [each for each in module.children() if next(each.parameters(), None) is not None]
    return held[0] if type(module).forward is LightningModule.forward and len(held) == 1 else module
