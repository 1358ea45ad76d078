"""A callback for Lightning: one fit searches, cuts, and retrains the smaller model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from upop.errors import SettingError
from upop.integrations.compressing import Compressing

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("LightningCallback needs lightning: pip install 'upop[integrations]'.") from error


class LightningCallback(Compressing, Callback):
    """Compresses the model during a fit, as `upop.Compression` does in a custom loop.

    The search takes the first tenth of the steps; then the model and the optimizer state are cut, and training
    continues. The dense model is the teacher in all steps. Scores are taken before gradients are clipped. The state is
    part of Lightning's checkpoints, so `ckpt_path` resumes before and after the cut. A fit that stops early cuts to the
    progress reached; one that fails leaves a dense model without masks.

    Args:
        ratio: share of the prunable parameters to remove, in (0, 1).
        module: attribute of the LightningModule to compress. By default the whole module; or, if it has no forward of
            its own and holds one model, this model.
        settings: further arguments of `upop.Compression`, except the model and the number of steps; target (limits for
            the whole model) replaces the ratio.

    Raises:
        SettingError: the ratio is out of range; at the start of the fit, a setting is invalid.
    """

    def __init__(self, ratio: float | None = None, *, module: str | None = None, **settings: Any) -> None:
        super().__init__(ratio, **settings)
        self._module = module
        self._resumed: dict[str, Any] | None = None
        self._stepping = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect weights of a cut model: Lightning loads a checkpoint before the fit starts."""
        if stage == "fit":
            self.expect(self._model_of(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or resume the compression."""
        self.begin(self._model_of(pl_module), trainer.estimated_stepping_batches, self._resumed)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the distillation loss to the loss, which Lightning has already divided and scaled."""
        if self.compression is not None:
            scaler = _scaler_of(trainer)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            added = self.compression.loss(loss.new_zeros(()))
            if added.requires_grad:
                loss.add_(added * (scale / trainer.accumulate_grad_batches))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Add the scores of this step."""
        if self.compression is not None and not self._stepping:
            self.compression.before_step([optimizer], _scaler_of(trainer))
            self._stepping = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Cut the model when due, after the optimizer step."""
        if self.compression is not None and self._stepping:
            self._stepping = False
            self.compression.after_step(trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut to the progress reached, if the fit ended early, and release the teacher."""
        if self.compression is not None:
            self.compression.finish(*trainer.optimizers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove masks and hooks."""
        if self.compression is not None:
            self.compression.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoint."""
        return {} if self.compression is None else self.compression.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the fit starts."""
        self._resumed = state_dict or None

    def _model_of(self, pl_module: LightningModule) -> nn.Module:
        model: Any = _called(pl_module) if self._module is None else getattr(pl_module, self._module, None)
        if not isinstance(model, nn.Module):
            raise SettingError(f"module={self._module!r} names no module of {type(pl_module).__name__}.")
        return model


def _scaler_of(trainer: Trainer) -> Any:
    """Return Lightning's GradScaler, which has already unscaled the gradients, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _called(module: LightningModule) -> nn.Module:
    """Return the module that training steps call: the only child of a module without its own forward."""
    held = [each for each in module.children() if next(each.parameters(), None) is not None]
    return held[0] if type(module).forward is LightningModule.forward and len(held) == 1 else module
