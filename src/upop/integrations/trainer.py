"""A callback for transformers' Trainer: one training searches, cuts, and retrains the smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments

from upop.errors import CheckpointError
from upop.files import replacing_file
from upop.integrations.compressing import Compressing
from upop.ownership import wrote_archive
from upop.pruning.masks import unwrapped

_STATE = "upop_compression.pt"


class TrainerCallback(Compressing, transformers.TrainerCallback):
    """Compresses the model during a training, as `upop.Compression` does in a custom loop.

    The search takes the first tenth of the steps; then the model and the optimizer state are cut, and training
    continues. The dense model is the teacher in all steps: its loss is added to the loss that the model returns. With a
    `compute_loss_func`, add it there: `callback.compression.loss(loss)`. Checkpoints hold the state, so
    `resume_from_checkpoint` works before and after the cut, from the same dense model. A training that stops early cuts
    to the progress reached. Scores are of the gradients that the optimizer gets, clipped or not.

    A Trainer does not report exceptions to callbacks: call `close` after one to remove the masks. With label smoothing
    the Trainer computes the loss itself; add the distillation loss by `compute_loss_func`.

    Args:
        ratio: share of the prunable parameters to remove, in (0, 1).
        settings: further arguments of `upop.Compression`, except the model and the number of steps; target (limits for
            the whole model) replaces the ratio.

    Raises:
        SettingError: the ratio is out of range; at the start of the training, a setting is invalid.
    """

    def __init__(self, ratio: float | None = None, **settings: Any) -> None:
        super().__init__(ratio, **settings)
        self._adding: RemovableHandle | None = None
        self._parts = 1.0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Expect weights of a cut model: the Trainer loads a checkpoint before the training starts."""
        self.expect(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start or resume the compression."""
        model = unwrapped(kwargs["model"])
        resumed = _read(_checkpoint(args, state) / _STATE) if state.global_step else None
        self.begin(model, state.max_steps, resumed)
        # The Trainer divides by these itself, unless the model got the number of tokens.
        self._parts = float(args.gradient_accumulation_steps)
        if args.average_tokens_across_devices:
            self._parts *= args.world_size
        self._adding = model.register_forward_hook(self._add, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the scores of this step."""
        if self.compression is not None:
            self.compression.before_step([kwargs["optimizer"]])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the model when due, after the optimizer step."""
        if self.compression is None:
            return
        searching = self.compression.searching
        self.compression.after_step([kwargs["optimizer"]])
        if searching and not self.compression.searching:  # the best model so far is dense
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the compression beside the checkpoint that was just saved."""
        folder = _checkpoint(args, state)
        if self.compression is not None and state.is_world_process_zero and folder.is_dir():
            with replacing_file(folder / _STATE, replace=wrote_archive) as part:
                torch.save(self.compression.state_dict(), part)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut to the progress reached, if the training ended early, and release the teacher."""
        self._stop_adding()
        if self.compression is not None:
            self.compression.finish(kwargs["optimizer"])

    def close(self) -> None:
        """Remove masks and hooks after a training that failed, which the Trainer does not report."""
        self._stop_adding()
        if self.compression is not None:
            self.compression.close()

    def _stop_adding(self) -> None:
        if self._adding is not None:
            self._adding.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Add the distillation loss to the loss that the model returns."""
        if self.compression is None or self.compression.distillation is None:
            return None
        if not (module.training and torch.is_grad_enabled()):
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return None  # the Trainer has a loss function of its own
        added = self.compression.loss(loss.new_zeros(()))
        if kwargs.get("num_items_in_batch") is not None:
            added = added / self._parts
        if isinstance(output, tuple):
            return (loss + added, *output[1:])
        output["loss"] = loss + added
        return output


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its parsers meet
        raise CheckpointError(
            f"The compression cannot be resumed: {path} is missing or damaged ({type(error).__name__}). Resume from a "
            "checkpoint that was written during the compression, or start anew."
        ) from error
    return content
