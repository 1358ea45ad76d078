"""What lmms-eval asks of installed packages when it starts: models of their own.

upop has none. But its import, which this entry point (`lmms_eval.models` in pyproject.toml) brings about, lets
transformers load models whose layers differ: they run in lmms-eval without a flag wherever upop is installed.
"""

from __future__ import annotations


def models() -> tuple[()]:
    """Return no models; the import of upop is all that is wanted."""
    return ()
