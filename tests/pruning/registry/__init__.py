"""Every architecture that groups must be found in, masked, cut, saved and loaded: one row each, tiny and random.

`ARCHITECTURES` is what tests/pruning/test_coverage.py runs and docs/coverage.md shows. To add one, add a row to the
module of its library; sizes come from rules, so that a row is mostly a name.
"""

from __future__ import annotations

from pruning.registry.architecture import Architecture
from pruning.registry.others import OTHERS
from pruning.registry.timm_models import TIMM
from pruning.registry.transformers_models import TRANSFORMERS

ARCHITECTURES: tuple[Architecture, ...] = (*TIMM, *TRANSFORMERS, *OTHERS)

__all__ = ["ARCHITECTURES", "Architecture"]
