"""Precision to compute and to sum in: float32 at least, and the tensor's own where that is wider."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(tensor: Tensor) -> torch.dtype:
    """Return the precision that numbers of this tensor are summed in: float32, or float64 where the tensor is."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least; itself where it is."""
    return tensor.to(accumulator(tensor))
