"""A callback for transformers' Trainer: one training is the search, and the model that it leaves is smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from upop.errors import CheckpointError, SettingError
from upop.files import replacing_file
from upop.integrations.search import Search
from upop.ownership import wrote_archive

_STATE = "upop_search.pt"


class TrainerCallback(Search, transformers.TrainerCallback):
    """Searches while a Trainer trains, and cuts its model when it is done; then train it again to let it recover.

    Scores are taken from the gradients as they are; the callback then clips them to `max_grad_norm`. Checkpoints of the
    Trainer hold the dense weights, and the search beside them, so that `resume_from_checkpoint` goes on with it.

    Args:
        ratio: share of the units' total cost to remove, in (0, 1); 0.5 is 2x.
        interval: masks move at every `interval`-th optimizer step, and at the last one; by default eight times.
        verify: inputs on which the masked and the shrunken model are compared at the end; by default a few samples of
            the first batch. False cuts without proof. See `upop.Pruner.shrink`.
        settings: any other argument of `upop.Pruner` but the model and the number of steps.

    Raises:
        SettingError: the ratio is out of its range; at the start of the training, a setting that makes no sense.
        StepError: at the end of the training, when it was stopped before its last step.
    """

    def __init__(self, ratio: float, interval: int | None = None, *, verify: Any = True, **settings: Any) -> None:
        super().__init__(ratio, interval, verify=verify, **settings)
        self._clip = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put masks on the model, or go on with the search of the checkpoint that is resumed."""
        if args.load_best_model_at_end:
            raise SettingError(
                "load_best_model_at_end=True would put weights of an earlier step under the masks of the last one. Set "
                "it to False for the search; the training after it may choose its best epoch."
            )
        pruner = self.begin(kwargs["model"], state.max_steps)
        if state.global_step:
            pruner.load_state_dict(_read(_checkpoint(args, state) / _STATE))
        # The Trainer clips before it calls: then the scores of steps with large gradients would count for less.
        if not (args.fsdp or args.deepspeed or args.fp16):
            self._clip, args.max_grad_norm = args.max_grad_norm or 0.0, 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take this step's scores, and clip the gradients."""
        self.step()
        if self._clip:
            nn.utils.clip_grad_norm_(kwargs["model"].parameters(), self._clip)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the search beside the checkpoint that was just saved."""
        folder = _checkpoint(args, state)
        if self.pruner is not None and state.is_world_process_zero and folder.is_dir():
            with replacing_file(folder / _STATE, replace=wrote_archive) as part:
                torch.save(self.pruner.state_dict(), part)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the model for real."""
        if self._clip:
            args.max_grad_norm, self._clip = self._clip, 0.0
        self.end()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its parsers meet
        raise CheckpointError(
            f"The search cannot go on: {path} is missing or damaged ({type(error).__name__}). Resume from a checkpoint "
            "that was written during the search, or start it anew."
        ) from error
    return content
