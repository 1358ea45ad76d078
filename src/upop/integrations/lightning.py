"""A callback for Lightning: one fit searches, cuts, and lets the model that is smaller recover."""

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
    """Compresses while a Trainer fits: the same as a loop of one's own with `upop.Compression`.

    The first tenth of the steps searches; then the model is cut, with the optimizers' state, and training goes on. The
    dense model teaches in all steps. Lightning calls it before it clips gradients, and keeps it in its own checkpoints,
    so that `ckpt_path` goes on with it, before the cut and after it. A fit that is stopped early leaves what was
    reached by then; one that fails leaves a model without masks.

    Args:
        ratio: share of the prunable parameters to remove, in (0, 1).
        module: name of the attribute of the LightningModule that is compressed. If not given, the whole module; or,
            where that has no forward of its own and holds one model, this model, which is what is called.
        settings: any other argument of `upop.Compression` but the model and the number of steps; target (what is left
            of the whole model) may take the place of the ratio.

    Raises:
        SettingError: the ratio is out of its range; at the start of the fit, a setting that makes no sense.
    """

    def __init__(self, ratio: float | None = None, *, module: str | None = None, **settings: Any) -> None:
        super().__init__(ratio, **settings)
        self._module = module
        self._resumed: dict[str, Any] | None = None
        self._stepping = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect weights of a model that was cut: Lightning reads those that it resumes from before the fit starts."""
        if stage == "fit":
            self.expect(self._model_of(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or resume from the checkpoint that is resumed."""
        self.begin(self._model_of(pl_module), trainer.estimated_stepping_batches, self._resumed)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add what the teacher says to the loss, which Lightning has divided and scaled already."""
        if self.compression is not None:
            scaler = _scaler_of(trainer)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            added = self.compression.loss(loss.new_zeros(()))
            if added.requires_grad:
                loss.add_(added * (scale / trainer.accumulate_grad_batches))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take this step's scores."""
        if self.compression is not None and not self._stepping:
            self.compression.before_step([optimizer], _scaler_of(trainer))
            self._stepping = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Cut the model when it is due; the optimizers have taken their step."""
        if self.compression is not None and self._stepping:
            self._stepping = False
            self.compression.after_step(trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut to what was reached, if the fit ended early, and let the teacher go."""
        if self.compression is not None:
            self.compression.finish(*trainer.optimizers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave neither masks nor hooks."""
        if self.compression is not None:
            self.compression.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the compression, for Lightning's checkpoint."""
        return {} if self.compression is None else self.compression.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the compression of a checkpoint until the fit begins."""
        self._resumed = state_dict or None

    def _model_of(self, pl_module: LightningModule) -> nn.Module:
        model: Any = _called(pl_module) if self._module is None else getattr(pl_module, self._module, None)
        if not isinstance(model, nn.Module):
            raise SettingError(
                f"module={self._module!r} was asked for, and {type(pl_module).__name__} has no module of this name."
            )
        return model


def _scaler_of(trainer: Trainer) -> Any:
    """Return the GradScaler that Lightning scales losses with, and has taken off gradients already; None without."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _called(module: LightningModule) -> nn.Module:
    """Return what the steps of a module call: what they call instead of a module without a forward of its own."""
    held = [each for each in module.children() if next(each.parameters(), None) is not None]
    return held[0] if type(module).forward is LightningModule.forward and len(held) == 1 else module
