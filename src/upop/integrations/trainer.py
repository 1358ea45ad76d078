"""A callback for transformers' Trainer: one training searches, cuts, and lets the model that is smaller recover."""

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
    """Compresses while a Trainer trains: the same as a loop of one's own with `upop.Compression`.

    The first tenth of the steps searches; then the model is cut, with the optimizer's state, and training goes on. The
    dense model teaches in all steps: what it says is added to the loss that the model returns. Where the Trainer has a
    `compute_loss_func`, add it there: `callback.compression.loss(loss)`. Checkpoints hold what it takes to go on
    (`resume_from_checkpoint`), before the cut and after it, from the same dense model. A training that is stopped early
    leaves what was reached by then. Scores are of gradients as the optimizer gets them, clipped ones included.

    A Trainer tells no callback of an exception: `close` takes the masks off after one. With label smoothing it
    computes the loss itself, and takes the teacher's part by `compute_loss_func`.

    Args:
        ratio: share of the prunable parameters to remove, in (0, 1).
        settings: any other argument of `upop.Compression` but the model and the number of steps; target (what is left
            of the whole model) may take the place of the ratio.

    Raises:
        SettingError: the ratio is out of its range; at the start of the training, a setting that makes no sense.
    """

    def __init__(self, ratio: float | None = None, **settings: Any) -> None:
        super().__init__(ratio, **settings)
        self._adding: RemovableHandle | None = None
        self._parts = 1.0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Expect weights of a model that was cut: the Trainer reads those that it resumes from before it begins."""
        self.expect(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or resume from the checkpoint that is resumed."""
        model = unwrapped(kwargs["model"])
        resumed = _read(_checkpoint(args, state) / _STATE) if state.global_step else None
        self.begin(model, state.max_steps, resumed)
        # What the Trainer divides by itself, unless the model was told how many tokens there are.
        self._parts = float(args.gradient_accumulation_steps)
        if args.average_tokens_across_devices:
            self._parts *= args.world_size
        self._adding = model.register_forward_hook(self._add, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take this step's scores."""
        if self.compression is not None:
            self.compression.before_step([kwargs["optimizer"]])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the model when it is due; the optimizer has taken its step."""
        if self.compression is None:
            return
        searching = self.compression.searching
        self.compression.after_step([kwargs["optimizer"]])
        if searching and not self.compression.searching:  # what was best so far is the dense model
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write beside the checkpoint that was just saved what a resumed training needs."""
        folder = _checkpoint(args, state)
        if self.compression is not None and state.is_world_process_zero and folder.is_dir():
            with replacing_file(folder / _STATE, replace=wrote_archive) as part:
                torch.save(self.compression.state_dict(), part)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut to what was reached, if the training ended early, and let the teacher go."""
        self._stop_adding()
        if self.compression is not None:
            self.compression.finish(kwargs["optimizer"])

    def close(self) -> None:
        """Leave neither masks nor hooks, after a training that failed: the Trainer tells no callback of it."""
        self._stop_adding()
        if self.compression is not None:
            self.compression.close()

    def _stop_adding(self) -> None:
        if self._adding is not None:
            self._adding.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Add what the teacher says to the loss that the model returns."""
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
            f"The compression cannot go on: {path} is missing or damaged ({type(error).__name__}). Resume from a "
            "checkpoint that was written while it ran, or start it anew."
        ) from error
    return content
