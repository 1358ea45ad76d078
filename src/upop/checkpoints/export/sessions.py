"""Runs a model in another runtime within this process, to time it or to compare outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from upop.checkpoints.export.any_graph import graph_of_any
from upop.checkpoints.export.graph_files import running, without_empty_branches
from upop.checkpoints.export.graphs import as_inputs
from upop.checkpoints.export.writers import Format
from upop.pruning.costs import evaluating

RUNTIMES: Mapping[str, Format] = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Runtime -> its format."""
_MASK, _IDS = "attention_mask", "input_ids"


class Session(nn.Module):
    """A model in another runtime, on the CPU: it takes the model's inputs, and has no parameters.

    Args:
        run: input tensors -> output tensors.
        ordered: the arguments of a call -> the input tensors, in the order of the graph.
    """

    def __init__(
        self, run: Callable[[Sequence[Tensor]], Sequence[Tensor]], ordered: Callable[[Any], Sequence[Tensor]]
    ) -> None:
        super().__init__()
        self._run, self._ordered = run, ordered

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the output tensors of a call."""
        return tuple(self._run(self._ordered(kwargs if kwargs else args)))


def session(model: nn.Module, inputs: Any, runtime: str) -> Session:
    """Return a model in another runtime.

    Args:
        model: a model on the CPU, in float32; it is not changed.
        inputs: the inputs of one call: a tensor, a tuple of tensors, or a mapping of keyword arguments.
        runtime: a name in `RUNTIMES`.

    Raises:
        SettingError: the model cannot be traced, or the runtime's format lacks one of its operations.
        MissingLibraryError: the runtime is not installed.
    """
    model = without_empty_branches(model)
    with evaluating(model), tempfile.TemporaryDirectory() as folder:
        graph = graph_of_any(model, tree_map(_twice, inputs))
        run = running(model, graph, RUNTIMES[runtime], Path(folder))

    def ordered(given: Any) -> Sequence[Tensor]:
        if isinstance(given, Mapping) and _MASK in graph.inputs and _MASK not in given and _IDS in given:
            given = {**given, _MASK: torch.ones_like(given[_IDS])}
        return as_inputs(graph, given)

    return Session(run, ordered)


def _twice(value: Any) -> Any:
    """Return a batch of 1 as a batch of 2, since tracing specialises sizes of 1."""
    return torch.cat([value] * 2) if isinstance(value, Tensor) and len(value) < 2 else value
